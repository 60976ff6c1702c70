"""What a manifest keeps of the prompts of a fit: small, without texts, and enough to know them again."""

import json

import numpy as np
import pytest

from inward.errors import DataError
from inward.offline.data.pairs import prompt_groups
from inward.offline.fit.hybrid import fit_hybrid
from inward.offline.fit.joint import Joint
from inward.offline.fit.seen_prompts import BITS, MOST_BYTES, Seen, dump, seen
from inward.offline.fit.whitened import FromStates, fit_whitened
from support.small_heads import manifest, pair_states


def prompts(start, stop):
    return prompt_groups(f"Question {i}?" for i in range(start, stop))


def fitted(groups, **options):
    return manifest(fit={"prompts": dump(groups)}, **options)


def test_all_prompts_of_the_fit_are_known_again_and_hardly_any_other():
    head = fitted(prompts(0, 2000))
    assert seen(head, prompts(500, 1500)) == Seen(1000, 1000, pytest.approx(8, abs=4))
    others = seen(head, prompts(2000, 4000))
    assert others.prompts < 40 and not others.clear
    assert others.prompts == pytest.approx(others.by_chance, abs=20)


@pytest.mark.parametrize(("inside", "clear", "substantial"), [(0, False, False), (40, True, False), (100, True, True)])
def test_a_part_of_the_prompts_is_told_from_chance(inside, clear, substantial):
    found = seen(fitted(prompts(0, 1000)), prompts(1000 - inside, 2000 - inside))
    assert (found.clear, found.substantial) == (clear, substantial)


def test_a_filter_has_no_texts_and_its_size_is_bounded():
    few = dump(prompt_groups(["a secret"] * 3))
    assert few["count"] == 1 and len(json.dumps(few)) < 300 and "secret" not in json.dumps(few)
    many = np.random.default_rng(0).integers(0, 2**62, 400_000)
    assert BITS * len(many) > MOST_BYTES * 8
    kept = dump(many)
    assert len(json.dumps(kept)) < 256 * 1024 + 100
    assert seen(manifest(fit={"prompts": kept}), many[:500]).substantial
    assert not seen(manifest(fit={"prompts": kept}), prompts(0, 500)).clear


def test_what_the_parts_of_a_head_have_seen_it_has_seen():
    part = {"manifest": fitted(prompts(0, 50)).model_dump(mode="json")}
    head = fitted(prompts(50, 100), options={"parts": [part]})
    assert seen(head, prompts(0, 100)).prompts == 100


def test_heads_that_say_nothing_of_their_prompts_are_not_judged():
    assert seen(manifest(), prompts(0, 9)) is None
    assert seen(manifest(fit={"prompts": dump(np.arange(9))}), np.arange(9)) is None
    assert "filter" not in dump(np.arange(9))  # somebody's numbers, that name no prompts
    assert seen(fitted(prompts(0, 9)), np.arange(9)) is None


def test_a_damaged_filter_is_told():
    for damage in ({"filter": "A"}, {"filter": 7}, {"hashes": "x"}):
        head = manifest(fit={"prompts": {**dump(prompts(0, 9)), **damage}})
        with pytest.raises(DataError, match="'legend': what its manifest says of the prompts"):
            seen(head, prompts(0, 9))


def test_fits_keep_it():
    states = pair_states(first=2**62)  # as hashes are
    hybrid, _ = fit_hybrid(states, joint=Joint(steps=2), progress=False)
    whitened, _ = fit_whitened(FromStates.of(states, most=60))  # of which a part only judges
    for head in (hybrid, whitened):
        assert head.manifest.fit["prompts"]["count"] == 40 and head.manifest.fit["rows"] == 120
        assert seen(head.manifest, states.groups_N).prompts == 40
