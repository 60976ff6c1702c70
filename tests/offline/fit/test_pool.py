"""Pools that are trained, and heads that get a pool, on tokens of which only some tell."""

import numpy as np
import pytest

from inward.backbones.fake import FakeBackbone
from inward.heads.pooling import Pool
from inward.offline.data.pairs import Pair
from inward.offline.fit.pool import FOLDS, Tokens, _pooled, _train, fit_pool
from inward.offline.fit.probes import pair_accuracy
from inward.offline.fit.whitened import FromStates, fit_whitened
from inward.offline.states.read import store_pairs
from inward.types import Reading
from support.letters import prompts


def telling(n=90, width=6, seed=0):
    """Token scores that are noise but for two tokens, which one dimension of the states marks."""
    rng = np.random.default_rng(seed)
    scores, states = [], []
    for row in range(2 * n):
        length = int(rng.integers(8, 20))
        score, state = rng.normal(size=length), rng.normal(size=(length, width))
        marked = rng.choice(length, 2, replace=False)
        state[:, 0], state[marked, 0] = -2, 2
        score[marked] += 0.9 if row < n else -0.9
        scores.append(score)
        states.append(state.astype(np.float16))
    return Tokens(scores, np.array([s.mean() for s in scores]), states)


@pytest.mark.parametrize("name", ["attention", "gated_mean"])
def test_a_trained_pool_looks_where_it_tells(name):
    tokens, pool = telling(), Pool(name=name, layer=2)
    folds = np.arange(90) % FOLDS
    maps = _train(tokens, pool, folds, 0, progress=False)
    assert maps.weight_FD.shape == (FOLDS + 1, 6)
    assert (maps.weight_FD[:, 0] > 2 * np.abs(maps.weight_FD[:, 1:]).max()).all()
    trained = pair_accuracy(_pooled(tokens, pool, maps, folds))
    assert trained > pair_accuracy(_pooled(tokens, Pool(name="mean"), None, folds)) + 0.1
    fresh = telling(seed=1)
    assert pair_accuracy(_pooled(fresh, pool, maps, np.full(90, FOLDS))) > 0.9


def test_the_same_tokens_and_seed_train_the_same_pool():
    one, two = (_train(telling(), Pool(name="attention", layer=2), np.arange(90) % 3, 4, progress=False) for _ in "ab")
    np.testing.assert_array_equal(one.weight_FD, two.weight_FD)


@pytest.mark.parametrize("name", ["max_rolling:window=3", "attention"])
async def test_a_head_gets_a_pool_and_a_calibration_of_pooled_scores(tmp_path, name):
    backbone = FakeBackbone(tokens=200)
    pairs = [Pair(f"question {i // 2}", f"good {i} answer", f"bad {i} answer") for i in range(60)]
    where = {"layers": (1, 2, 4), "position": "mean", "progress": False}
    states = await store_pairs(backbone, prompts(), pairs, tmp_path / "s.safetensors", **where)

    def fit(some):
        return fit_whitened(FromStates.of(some), layer="sweep")

    head, report = await fit_pool(backbone, prompts(), pairs, states, fit, name, progress=False)
    assert head.pools and head.manifest.pool.name == name.partition(":")[0]
    assert head.manifest.fit["metrics"]["pool"]["accuracy"] == report.accuracy
    plain = fit(states)[0]
    assert head.manifest.calibration.keys() == plain.manifest.calibration.keys()
    assert head.manifest.calibration["score_deciles"] != plain.manifest.calibration["score_deciles"]
    np.testing.assert_array_equal(head.tensors()["direction"], plain.tensors()["direction"])
    group = prompts().group("question 1", ["good 3 answer"]).group
    (reading,) = await backbone.read([group], [head.readout], tokens=True)
    (score,) = head.score(reading.readings[0]).scores_N
    (values,) = reading.readings[0].tokens_TK
    if name.startswith("max"):
        own = values[:, 0]
        assert score == pytest.approx(min(own[i : i + 3].mean() for i in range(len(own) - 2)), rel=1e-5)
    else:
        assert score == pytest.approx(np.average(values[:, 0], weights=np.exp(values[:, 1])), rel=1e-4)
    assert isinstance(reading.readings[0], Reading)


class Huge(FakeBackbone):
    """One dimension is beyond float16, as in models with a few huge ones."""

    def _states(self, place, prefixes_R):
        states = super()._states(place, prefixes_R)
        states[:, 3] *= 1e5
        return states


@pytest.mark.parametrize("name", ["attention", "gated_mean"])
async def test_states_beyond_float16_train_a_pool_and_count_twice_as_much(tmp_path, monkeypatch, name):
    backbone = Huge(tokens=200)
    pairs = [Pair(f"question {i // 2}", f"good {i} answer", f"bad {i} answer") for i in range(60)]
    where = {"layers": (2,), "position": "mean", "progress": False}
    states = await store_pairs(backbone, prompts(), pairs, tmp_path / "s.safetensors", **where)

    def fit(some):
        return fit_whitened(FromStates.of(some), layer="sweep")

    head, whole = await fit_pool(backbone, prompts(), pairs, states, fit, name, progress=False)
    assert whole.pairs == 60
    assert np.isfinite(head.tensors()["pool_weight"]).all() and np.isfinite(whole.auc)
    longest = max(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    monkeypatch.setattr("inward.offline.fit.pool.TOKEN_BYTES", 40 * longest * 4 * backbone.info.width)
    _, part = await fit_pool(backbone, prompts(), pairs, states, fit, name, progress=False)
    assert 40 <= part.pairs < 60


async def test_pairs_whose_tokens_do_not_fit_in_memory_are_left_out_of_all_that_is_said_of_the_pool(
    tmp_path, monkeypatch
):
    backbone = FakeBackbone(tokens=200)
    pairs = [Pair(f"question {i // 2}", f"good {i} answer", f"bad {i} answer") for i in range(60)]
    states = await store_pairs(backbone, prompts(), pairs, tmp_path / "s.safetensors", layers=(2,), progress=False)

    def fit(some):
        return fit_whitened(FromStates.of(some), layer="sweep")

    _, whole = await fit_pool(backbone, prompts(), pairs, states, fit, "attention", progress=False)
    longest = max(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    monkeypatch.setattr("inward.offline.fit.pool.TOKEN_BYTES", 40 * longest * 2 * backbone.info.width)
    _, part = await fit_pool(backbone, prompts(), pairs, states, fit, "attention", progress=False)
    assert whole.pairs == 60 and 40 <= part.pairs < 60
    _, every = await fit_pool(backbone, prompts(), pairs, states, fit, "max_rolling:window=3", progress=False)
    assert every.pairs == 60  # nothing of it is trained
