"""What heads may be scored on."""

from dataclasses import replace

import numpy as np
import pytest

from inward.errors import DataError
from inward.offline.evaluate.report import of_states
from inward.offline.evaluate.scoring import score
from inward.offline.fit.whitened import FromStates, fit_whitened
from inward.offline.states.scores import score_states
from support.small_heads import pair_states


@pytest.mark.parametrize("normed", [True, False])
def test_a_head_is_scored_on_states_with_its_own_final_norm_only(normed):
    states = pair_states()
    own = replace(states, origin=replace(states.origin, final_norm=normed))
    head = fit_whitened(FromStates.of(own), layer=3)[0]
    assert np.isfinite(score_states(own, [head])).all() and score(head, of_states(own)).scores_M is not None
    other = replace(states, origin=replace(states.origin, final_norm=not normed))
    for scored in (lambda: score_states(other, [head]), lambda: score(head, of_states(other))):
        with pytest.raises(DataError, match=f"layer 3 {'after' if normed else 'before'} the final norm"):
            scored()


def test_the_final_norm_is_of_the_last_layer_alone():
    states = pair_states()
    head = fit_whitened(FromStates.of(states), layer=2)[0]
    assert np.isfinite(score_states(replace(states, origin=replace(states.origin, final_norm=True)), [head])).all()
