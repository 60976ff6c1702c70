"""How well a head still fits: 1 on the states that it was fitted on, less once they have moved."""

from dataclasses import replace

import numpy as np
import pytest

from inward.errors import DataError, SetupError
from inward.offline.fit.drift import drift
from inward.offline.fit.ensemble import Judges, fit_ensemble
from inward.offline.fit.hybrid import fit_hybrid
from inward.offline.fit.joint import Joint
from inward.offline.fit.legend import fit_legend
from inward.offline.fit.like import fit_like, like_of
from inward.offline.fit.whitened import FromStates, fit_whitened
from inward.offline.states.saved import Origin
from inward.offline.states.scores import score_states
from inward.offline.states.stored import SomeLayers
from support.small_heads import pair_states


def moved(states, angle):
    """The direction that tells turns away, as a policy's states do."""
    turn = np.eye(states.width, dtype=np.float32)
    turn[:2, :2] = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    return replace(states, chosen_NLD=states.chosen_NLD @ turn, rejected_NLD=states.rejected_NLD @ turn)


def heads(states):
    return [
        fit_legend(states, layer=2)[0],
        fit_whitened(FromStates.of(states), layer=2)[0],
        fit_hybrid(states, joint=Joint(steps=20), progress=False)[0],
    ]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_head_fits_its_own_states_and_less_once_they_moved(which):
    states = pair_states(n=200, strength=(0.2, 2.0, 1.5))
    head = heads(states)[which]
    same, little, far = (drift(head, moved(states, angle)) for angle in (0.0, 0.5, 1.5))
    assert same.cosine > 0.97 and same.pairs == 200
    assert same.cosine > little.cosine > far.cosine
    assert far.cosine < 0.6 and far.accuracy < 0.7 < far.refitted_accuracy


def test_a_head_is_refitted_in_its_own_way():
    mean, whitened, hybrid = heads(pair_states())
    assert [like_of(head) for head in (mean, whitened, hybrid)] == ["legend", "whitened", "hybrid"]
    again = fit_like("whitened", whitened, pair_states())
    assert again.manifest.layers == (2,) and again.manifest.options["direction"] == "whitened"
    with pytest.raises(SetupError, match="ensemble"):
        fit_like("ensemble", None, pair_states())


@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize("layers", [(1, 2), (2,), (2, 3)])
def test_a_head_is_refitted_on_the_layers_that_it_reads(layers, final_norm):
    """States may hold more, of which the last was read after the final norm."""
    states = replace(pair_states(), origin=replace(pair_states().origin, final_norm=final_norm))
    own = SomeLayers.of(states, layers)
    whitened = fit_whitened(FromStates.of(own))[0]
    hybrid = fit_hybrid(own, joint=Joint(steps=20), progress=False)[0]
    both = fit_ensemble([whitened, hybrid], score_states(states, [whitened, hybrid]), Judges(states.groups_N, ""))[0]
    for head in (whitened, hybrid, both):
        again = fit_like(like_of(head), head, states)
        assert (again.manifest.layers, again.manifest.final_norm) == (layers, final_norm and 3 in layers)
        assert drift(head, states).cosine > 0.9


def test_states_without_a_layer_of_the_head_are_refused():
    with pytest.raises(DataError, match="layer 3 is not among"):
        fit_like("hybrid", heads(pair_states())[2], SomeLayers.of(pair_states(), (1, 2)))


def test_states_that_the_head_does_not_read_are_refused():
    head = heads(pair_states())[0]
    with pytest.raises(DataError, match="position"):
        drift(head, replace(pair_states(), origin=Origin("eos")))
