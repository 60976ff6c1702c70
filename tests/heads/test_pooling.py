import math

import numpy as np
import pytest

from inward.errors import HeadError, InternalError
from inward.heads import store
from inward.heads.hybrid import HybridHead
from inward.heads.legend import LegendHead
from inward.heads.pooling import TRAINED, Pool, pooling
from inward.heads.srr import SrrHead
from inward.types import Reading
from support.small_heads import legend, manifest

NAMES = ["last", "mean", "max_ema", "max_rolling", "topk", "gated_mean", "attention"]
RNG = np.random.default_rng(0)
SCORES, LOGITS = RNG.normal(size=37), 3 * RNG.normal(size=37)


def pool(name, **parameters):
    return Pool(name=name, layer=2 if name in TRAINED else None, **parameters)


def pooled(name, scores=SCORES, logits=LOGITS, parts=1, **parameters):
    state = pooling(pool(name, **parameters))
    for one, logit in zip(np.array_split(scores, parts), np.array_split(logits, parts), strict=True):
        state.push(one, logit)
    return state.value


def by_definition(name):
    s, weights = SCORES, {"gated_mean": 1 / (1 + np.exp(-LOGITS)), "attention": np.exp(LOGITS)}
    if name in weights:
        return (weights[name] * s).sum() / weights[name].sum()
    if name == "max_ema":
        averages = [s[0]]
        for one in s[1:]:
            averages.append(0.5 * one + 0.5 * averages[-1])
        return min(averages)
    return {
        "last": s[-1],
        "mean": s.mean(),
        "max_rolling": min(s[i : i + 10].mean() for i in range(len(s) - 9)),
        "topk": np.sort(s)[:10].mean(),
    }[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parts", [1, 3, 37])
def test_what_is_pushed_in_parts_is_pooled_as_its_definition_says(name, parts):
    assert pooled(name, parts=parts) == pytest.approx(by_definition(name))


@pytest.mark.parametrize("logits", [[-40.0, -41.0], [-900.0, -901.0]])
def test_gates_that_are_next_to_nothing_still_weigh(logits):
    assert pooled("gated_mean", np.array([1.0, 2.0]), np.array(logits)) == pytest.approx(1 + 1 / (1 + math.e))


@pytest.mark.parametrize("name", NAMES)
def test_one_token_is_its_own_pool_and_none_is_no_number(name):
    assert pooled(name, SCORES[:1], LOGITS[:1]) == pytest.approx(SCORES[0])
    assert math.isnan(pooling(pool(name)).value)


@pytest.mark.parametrize("name", NAMES)
def test_the_value_can_be_read_at_any_token(name):
    state = pooling(pool(name))
    for t in range(37):
        state.push(SCORES[t : t + 1], LOGITS[t : t + 1])
        assert state.value == pytest.approx(pooled(name, SCORES[: t + 1], LOGITS[: t + 1]))


def test_the_extreme_is_the_least_safe():
    """One bad stretch in a good answer: the mean hides it, the extremes do not."""
    scores = np.ones(100)
    scores[40:55] = -3
    assert pooled("mean", scores, scores) > 0.3
    for name in ("max_ema", "max_rolling", "topk"):
        assert pooled(name, scores, scores) < -2.5


def test_parameters_do_what_they_say():
    assert pooled("max_ema", alpha=1.0) == SCORES.min()
    assert pooled("max_rolling", window=1) == SCORES.min()
    assert pooled("topk", k=1) == SCORES.min()
    assert pooled("topk", k=99) == pytest.approx(SCORES.mean())
    assert pooled("max_rolling", window=99) == pytest.approx(SCORES.mean()), "of all, while there are fewer"


def test_attention_does_not_overflow():
    assert pooled("attention", SCORES, 1000 * LOGITS, parts=5) == pytest.approx(SCORES[LOGITS.argmax()])


def test_the_command_line_names_a_pool_and_its_parameters():
    assert Pool.parse("max_rolling:window=20") == Pool(name="max_rolling", window=20)
    assert Pool.parse("attention", layer=7) == Pool(name="attention", layer=7)
    for wrong in ("max", "topk:k=0", "topk:q=1", "mean:window"):
        with pytest.raises(ValueError, match=r"pool|name|k|window|q"):
            Pool.parse(wrong)


def test_a_trained_pool_says_where_it_reads_and_the_others_do_not():
    with pytest.raises(ValueError, match="layer"):
        Pool(name="attention")
    with pytest.raises(ValueError, match="layer"):
        Pool(name="mean", layer=3)


def tokens(*lengths, k=1, seed=1):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(length, k)).astype(np.float32) for length in lengths)


def test_a_legend_head_pools_its_token_scores():
    plain = legend()
    head = LegendHead.from_tensors(manifest(pool={"name": "topk", "k": 2}), plain.tensors())
    assert head.pools and not plain.pools
    own = tokens(5, 0)
    scores = head.score(Reading(np.array([[7.0], [3.0]], np.float32), own), details=frozenset({"tokens"}), pair=True)
    assert scores.scores_N == (pytest.approx(np.sort(own[0][:, 0])[:2].mean()), 3.0), "nothing to pool: where it reads"
    assert scores.tokens_N[0] == tuple(map(float, own[0][:, 0])), "what was pooled is shown"
    assert scores.pair.margin == pytest.approx(scores.scores_N[0] - 3.0)


def test_a_token_that_is_not_finite_leaves_no_score():
    head = LegendHead.from_tensors(manifest(pool={"name": "mean"}), legend().tensors())
    own = tokens(5, 4)
    own[0][2] = np.nan
    assert head.score(Reading(np.zeros((2, 1), np.float32), own)).scores_N == (None, pytest.approx(own[1].mean()))


def test_a_pooling_head_needs_every_token():
    head = LegendHead.from_tensors(manifest(pool={"name": "mean"}), legend().tensors())
    with pytest.raises(InternalError, match="every token"):
        head.score(Reading(np.zeros((2, 1), np.float32)))


def test_a_trained_pool_reads_a_number_more_of_every_token(tmp_path):
    weight = np.random.default_rng(5).normal(size=4).astype(np.float32)
    tensors = {**legend().tensors(), "pool_weight": weight, "pool_bias": np.array([0.5], np.float32)}
    head = LegendHead.from_tensors(manifest(pool={"name": "attention", "layer": 2}), tensors)
    _own, extra = head.readout.taps
    assert (extra.layer, extra.weight_DK.shape, float(extra.bias_K[0])) == (2, (4, 1), 0.5)
    (both,) = tokens(6, k=2)
    (score,) = head.score(Reading(np.zeros((1, 2), np.float32), (both,))).scores_N
    assert score == pytest.approx(np.average(both[:, 0], weights=np.exp(both[:, 1])), rel=1e-5)
    loaded = store.load(store.save(head, tmp_path / "head"), width=4)
    assert loaded.manifest == head.manifest and loaded.readout.taps[1].weight_DK is not None
    with pytest.raises(HeadError, match="pool_weight"):
        LegendHead.from_tensors(manifest(pool={"name": "attention", "layer": 2}), legend().tensors())
    with pytest.raises(HeadError, match="layer"):
        LegendHead.from_tensors(manifest(pool={"name": "attention", "layer": 3}), tensors)


def test_a_hybrid_head_pools_rewards():
    n, d = 2, 4
    rng = np.random.default_rng(3)
    shapes = {"probe_weight": (n, d), "probe_bias": (n,), "gate_weight": (n, n), "mean": (n, d)}
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    tensors["scale"] = np.ones((n, d), np.float32)
    plain = HybridHead.from_tensors(manifest(kind="hybrid", layers=(1, 2)), tensors)
    head = HybridHead.from_tensors(
        manifest(kind="hybrid", layers=(1, 2), pool={"name": "max_rolling", "window": 3}), tensors
    )
    (own,) = tokens(8, k=2)
    (score,) = head.score(Reading(own[:1], (own,))).scores_N
    rewards = plain.rewards(own)[0]
    assert score == pytest.approx(min(rewards[i : i + 3].mean() for i in range(6)))


def test_a_ranker_pools_nothing():
    with pytest.raises(HeadError, match=r"pools|lacks"):
        SrrHead.from_tensors(manifest(kind="srr", pool={"name": "mean"}), {})


def test_a_head_without_a_pool_is_written_as_older_versions_read_it(tmp_path):
    assert '"pool"' not in (store.save(legend(), tmp_path / "plain") / "head.json").read_text()
    pooled = LegendHead.from_tensors(manifest(pool={"name": "mean"}), legend().tensors())
    assert '"name": "mean"' in (store.save(pooled, tmp_path / "pooled") / "head.json").read_text()
