import asyncio
import logging

import numpy as np
import pytest
from safetensors.numpy import load_file

from inward.backbones.base import Capacity
from inward.backbones.fake import FakeBackbone
from inward.errors import DataError, InternalError
from inward.offline.data.pairs import Pair, Response, ResponseList, prompt_groups
from inward.offline.states.moments import PairSums
from inward.offline.states.read import extract_lists, extract_pairs, store_pairs, sum_pairs, sum_responses
from inward.offline.states.saved import PairStates
from inward.types import Group, Readout, Tap
from support.letters import prompts

PAIRS = [Pair(f"question {i // 3}", f"good {i}" + "!" * (i % 7), f"bad {i % 2}") for i in range(20)]
FOLDERS = {"progress": False, "layers": (0, 2, 4)}


async def plain(backbone, prompt, response, layers, position="last", final_norm=False):
    """One response by itself ``[L, D]``."""
    group = prompts().group(prompt, [response]).group
    taps = tuple(Tap(k, position, final_norm=final_norm and k == backbone.info.layers) for k in layers)
    (reading,) = await backbone.read([Group(group.prompt_ids, group.responses_ids)], [Readout(taps)])
    return reading.readings[0].values_NK[0].reshape(len(layers), -1)


def same(a: PairStates, b: PairStates):
    return np.array_equal(a.chosen_NLD, b.chosen_NLD) and np.array_equal(a.rejected_NLD, b.rejected_NLD)


@pytest.mark.parametrize("position", ["last", "eos", "mean", "prompt"])
async def test_states_are_those_of_each_text_by_itself(position):
    backbone = FakeBackbone(tokens=120)
    states = await extract_pairs(backbone, prompts(), PAIRS, position=position, **FOLDERS)
    for i, pair in enumerate(PAIRS):
        np.testing.assert_allclose(
            states.chosen_NLD[i], await plain(backbone, pair.prompt, pair.chosen, (0, 2, 4), position), rtol=1e-6
        )
        np.testing.assert_allclose(
            states.rejected_NLD[i], await plain(backbone, pair.prompt, pair.rejected, (0, 2, 4), position), rtol=1e-6
        )


async def test_what_the_states_came_from_is_recorded():
    backbone = FakeBackbone()
    states = await extract_pairs(backbone, prompts(), PAIRS, position="eos", final_norm=True, **FOLDERS)
    assert states.layers == (0, 2, 4)
    origin = states.origin
    assert (origin.position, origin.final_norm, origin.template) == ("eos", True, "format:{prompt}: {response}")
    assert origin.backbone is not None
    assert origin.backbone.fingerprint == backbone.info.fingerprint
    assert states.length_difference_N is not None
    assert states.length_difference_N.tolist() == [len(p.chosen) - len(p.rejected) for p in PAIRS]
    assert np.array_equal(states.groups_N, prompt_groups(p.prompt for p in PAIRS))


async def test_the_final_norm_is_not_claimed_where_the_last_layer_was_not_read():
    states = await extract_pairs(FakeBackbone(), prompts(), PAIRS, layers=(1, 2), final_norm=True, progress=False)
    assert states.origin.final_norm is False


async def test_a_prompt_and_a_response_that_occur_again_are_computed_once_within_the_capacity():
    backbone = FakeBackbone(tokens=100)
    await extract_pairs(backbone, prompts(), PAIRS, **FOLDERS)
    computed = [(g.prompt_ids, r) for g in backbone.computed for r in g.responses_ids]
    assert len(computed) == len(set(computed)) == len({(p.prompt, r) for p in PAIRS for r in (p.chosen, p.rejected)})
    assert all(group.tokens <= 100 for group in backbone.computed)
    assert len(backbone.computed) < len(PAIRS)


async def test_an_interrupted_extraction_goes_on_without_computing_finished_batches_again(tmp_path):
    whole = await extract_pairs(FakeBackbone(tokens=120), prompts(), PAIRS, **FOLDERS)
    first, second = FakeBackbone(tokens=120), FakeBackbone(tokens=80)
    first.fail_on(lambda group: group.prompt_ids == prompts().group("question 3", ["x"]).group.prompt_ids)
    with pytest.raises(InternalError):
        await extract_pairs(first, prompts(), PAIRS, cache=tmp_path, **FOLDERS)
    assert first.computed, "nothing was finished before the failure: this test shows nothing"
    resumed = await extract_pairs(second, prompts(), PAIRS, cache=tmp_path, **FOLDERS)
    assert same(resumed, whole)
    done = {(g.prompt_ids, r) for g in first.computed for r in g.responses_ids}
    again = {(g.prompt_ids, r) for g in second.computed for r in g.responses_ids}
    assert again
    assert not done & again


async def test_a_finished_extraction_is_read_from_the_cache_alone(tmp_path):
    whole = await extract_pairs(FakeBackbone(), prompts(), PAIRS, cache=tmp_path, **FOLDERS)
    dead = FakeBackbone()
    dead.die()
    assert same(await extract_pairs(dead, prompts(), PAIRS, cache=tmp_path, **FOLDERS), whole)


@pytest.mark.parametrize(
    "other",
    [
        {"layers": (0, 2, 3)},
        {"position": "eos"},
        {"final_norm": True},
        {"pairs": PAIRS[:-1]},
        {"backbone": FakeBackbone(width=16, layers=5)},
    ],
)
async def test_the_cache_of_anything_else_is_not_used(tmp_path, other):
    await extract_pairs(FakeBackbone(), prompts(), PAIRS, cache=tmp_path, **FOLDERS)
    backbone = other.pop("backbone", FakeBackbone())
    pairs = other.pop("pairs", PAIRS)
    await extract_pairs(backbone, prompts(), pairs, **{**FOLDERS, "cache": tmp_path, **other})
    assert backbone.computed


async def test_a_damaged_batch_is_computed_again(tmp_path):
    whole = await extract_pairs(FakeBackbone(tokens=120), prompts(), PAIRS, cache=tmp_path, **FOLDERS)
    path = sorted(tmp_path.rglob("*.safetensors"))[0]
    missing = len(load_file(path)["groups"])
    path.write_bytes(path.read_bytes()[:-3])
    backbone = FakeBackbone(tokens=120)
    assert same(await extract_pairs(backbone, prompts(), PAIRS, cache=tmp_path, **FOLDERS), whole)
    assert len(backbone.computed) == missing


async def test_as_many_calls_are_in_flight_as_the_backbone_takes_and_one_stands_ready():
    class Counting(FakeBackbone):
        now = most = 0

        async def read(self, groups, readouts, *, tokens=False):
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0)
            try:
                return await super().read(groups, readouts, tokens=tokens)
            finally:
                self.now -= 1

    backbone = Counting(tokens=100)
    backbone.capacity = Capacity(100, concurrency=3)
    states = await extract_pairs(backbone, prompts(), PAIRS, **FOLDERS)
    assert backbone.most == 3 + 1
    assert same(states, await extract_pairs(FakeBackbone(), prompts(), PAIRS, **FOLDERS))


async def test_long_rows_are_truncated_and_counted(caplog):
    pairs = [*PAIRS, Pair("x" * 600, "yes", "no")]
    with caplog.at_level(logging.WARNING):
        states = await extract_pairs(FakeBackbone(), prompts(), pairs, **FOLDERS)
    assert len(states) == 21
    assert "1 of 21 rows" in caplog.text


async def test_a_row_that_cannot_be_tokenised_is_named():
    with pytest.raises(DataError, match=r"row 2: responses\.1"):
        await extract_pairs(FakeBackbone(), prompts(), [PAIRS[0], Pair("p", "fine", "half \ud800")], **FOLDERS)


@pytest.mark.parametrize("layers", [(), (5,), (-1,), (1, 1)])
async def test_layers_that_the_backbone_does_not_have_are_refused(layers):
    with pytest.raises(DataError, match="from 0 to 4"):
        await extract_pairs(FakeBackbone(), prompts(), PAIRS, layers=layers, progress=False)


async def test_lists_give_the_prompt_once_and_every_candidate(tmp_path):
    lists = [
        ResponseList("one", (Response("a", True), Response("b", False), Response("a", True))),
        ResponseList("two", (Response("c", False),)),
        ResponseList("one", (Response("d", True), Response("a", True))),
    ]
    backbone = FakeBackbone(tokens=30)
    states = await extract_lists(backbone, prompts(), lists, layers=(1, 4), cache=tmp_path, progress=False)
    assert states.group_M.tolist() == [0, 0, 0, 1, 2, 2]
    assert states.safe_M.tolist() == [True, False, True, False, True, True]
    assert states.groups_G[0] == states.groups_G[2] != states.groups_G[1]
    for one, prompt_LD in zip(lists, states.prompt_GLD, strict=True):
        np.testing.assert_allclose(prompt_LD, await plain(backbone, one.prompt, "a", (1, 4), "prompt"), rtol=1e-6)
    texts = [(one.prompt, r.text) for one in lists for r in one.responses]
    for (prompt, text), state_LD in zip(texts, states.candidates_MLD, strict=True):
        np.testing.assert_allclose(state_LD, await plain(backbone, prompt, text, (1, 4)), rtol=1e-6)
    dead = FakeBackbone()
    dead.die()
    again = await extract_lists(dead, prompts(), lists, layers=(1, 4), cache=tmp_path, progress=False)
    assert np.array_equal(again.prompt_GLD, states.prompt_GLD)
    assert np.array_equal(again.candidates_MLD, states.candidates_MLD)


async def test_states_do_not_share_memory_needlessly():
    states = await extract_pairs(FakeBackbone(), prompts(), PAIRS, **FOLDERS)
    assert states.chosen_NLD.base is states.rejected_NLD.base, (
        "both halves are views of one array: nothing is held twice"
    )


async def test_states_that_go_to_a_file_are_the_same(tmp_path):
    backbone = FakeBackbone(tokens=120)
    stored = await store_pairs(backbone, prompts(), PAIRS, tmp_path / "s.safetensors", position="eos", **FOLDERS)
    wanted = await extract_pairs(backbone, prompts(), PAIRS, position="eos", **FOLDERS)
    for mine, theirs in zip(stored.take(np.arange(20)), (wanted.chosen_NLD, wanted.rejected_NLD), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)  # float16
    assert (stored.layers, stored.origin.position) == (wanted.layers, "eos")
    assert stored.origin == wanted.origin
    assert np.array_equal(stored.length_difference_N, wanted.length_difference_N)


async def test_a_file_that_was_interrupted_is_gone_on_with(tmp_path):
    backbone = FakeBackbone(tokens=120)
    backbone.fail_on(lambda group: "question 6" in decoded(group))
    path = tmp_path / "s.safetensors"
    with pytest.raises(InternalError):
        await store_pairs(backbone, prompts(), PAIRS, path, **FOLDERS)
    backbone.fail_on(lambda group: False)
    before = len(backbone.computed)
    stored = await store_pairs(backbone, prompts(), PAIRS, path, **FOLDERS)
    fresh = await store_pairs(FakeBackbone(tokens=120), prompts(), PAIRS, tmp_path / "fresh.safetensors", **FOLDERS)
    assert 0 < len(backbone.computed) - before < 7, "what was done is not computed again"
    np.testing.assert_array_equal(stored.take(np.arange(20))[0], fresh.take(np.arange(20))[0])


@pytest.mark.parametrize("position", ["last", "eos", "mean"])
async def test_sums_over_texts_are_those_of_their_states(position):
    backbone = FakeBackbone(tokens=120)
    summed = await sum_pairs(backbone, prompts(), PAIRS, position=position, most=9, **FOLDERS)
    states = await extract_pairs(backbone, prompts(), PAIRS, position=position, **FOLDERS)
    assert (len(summed.groups_N), len(np.unique(summed.groups_N))) == (20, 7)
    for axis in range(3):
        wanted = PairSums.of(states.chosen_NLD[:, axis], states.rejected_NLD[:, axis])
        np.testing.assert_allclose(summed.sums(axis).mean_difference_D, wanted.mean_difference_D, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(
            summed.sums(axis).moments.covariance_DD, wanted.moments.covariance_DD, rtol=1e-4, atol=1e-6
        )
    kept = set(summed.kept.groups_N)
    members = np.flatnonzero([g in kept for g in states.groups_N])
    assert 0 < len(members) < 20, "some prompts are kept, with all of their pairs"
    np.testing.assert_allclose(summed.kept.chosen_NLD, states.chosen_NLD[members], rtol=1e-6)


async def test_sums_that_were_interrupted_are_gone_on_with(tmp_path):
    backbone = FakeBackbone(tokens=120)
    backbone.fail_on(lambda group: "question 6" in decoded(group))
    with pytest.raises(InternalError):
        await sum_pairs(backbone, prompts(), PAIRS, checkpoint=tmp_path, **FOLDERS)
    backbone.fail_on(lambda group: False)
    before = len(backbone.computed)
    summed = await sum_pairs(backbone, prompts(), PAIRS, checkpoint=tmp_path, **FOLDERS)
    whole = await sum_pairs(FakeBackbone(tokens=120), prompts(), PAIRS, **FOLDERS)
    assert 0 < len(backbone.computed) - before < 7
    np.testing.assert_allclose(
        summed.sums(1).moments.scatter_DD, whole.sums(1).moments.scatter_DD, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(summed.kept.chosen_NLD, whole.kept.chosen_NLD)


async def test_sums_of_other_labels_are_begun_anew(tmp_path):
    said = ["aa x", "bb y", "cc z"]
    rows = [Pair(f"question {k}", said[a], said[b]) for k in range(6) for a, b in ((0, 1), (1, 2), (0, 2))]
    turned = [Pair(p.prompt, p.rejected, p.chosen) if i % 3 == 1 else p for i, p in enumerate(rows)]
    backbone = FakeBackbone(tokens=60)
    backbone.fail_on(lambda group: "question 4" in decoded(group))
    with pytest.raises(InternalError):
        await sum_pairs(backbone, prompts(), rows, checkpoint=tmp_path, **FOLDERS)
    backbone.fail_on(lambda group: False)
    summed = await sum_pairs(backbone, prompts(), turned, checkpoint=tmp_path, **FOLDERS)  # the groups are the same
    whole = await sum_pairs(FakeBackbone(tokens=60), prompts(), turned, **FOLDERS)
    np.testing.assert_allclose(summed.sums(1).mean_difference_D, whole.sums(1).mean_difference_D, rtol=1e-4, atol=1e-6)


async def test_a_file_that_was_left_unfinished_by_a_pass_of_other_groups_is_begun_anew(tmp_path):
    rows = [Pair(f"question {q}", f"good answer {q} {i}", f"bad reply {q} {i}") for q in range(2) for i in range(12)]
    backbone, path = FakeBackbone(tokens=120), tmp_path / "s.safetensors"
    backbone.fail_on(lambda group: "question 1" in decoded(group))
    with pytest.raises(InternalError):
        await store_pairs(backbone, prompts(), rows, path, **FOLDERS)
    stored = await store_pairs(FakeBackbone(tokens=1000), prompts(), rows, path, **FOLDERS)
    whole = await extract_pairs(FakeBackbone(), prompts(), rows, **FOLDERS)
    chosen_NLD, rejected_NLD = stored.take(np.arange(len(rows)))
    np.testing.assert_allclose(chosen_NLD, whole.chosen_NLD, atol=1e-2)
    np.testing.assert_allclose(rejected_NLD, whole.rejected_NLD, atol=1e-2)


async def test_responses_without_labels_give_mean_and_covariance():
    rows = [(pair.prompt, (pair.chosen, pair.rejected)) for pair in PAIRS]
    moments = await sum_responses(FakeBackbone(), prompts(), rows, **FOLDERS)
    states = await extract_pairs(FakeBackbone(), prompts(), PAIRS, **FOLDERS)
    both = np.concatenate([states.chosen_NLD, states.rejected_NLD])[:, 2].astype(np.float64)
    np.testing.assert_allclose(moments[2].covariance_DD, np.cov(both.T, bias=True), rtol=1e-4, atol=1e-6)


def decoded(group):
    """The prompt of a group as text: its tokens are its characters, and one more."""
    return "".join(chr(i - 1) for i in group.prompt_ids)
