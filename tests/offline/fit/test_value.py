"""A value head on made-up runs whose rewards are known to follow the states."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from heads.test_watch import head
from inward.backbones.fake import FakeBackbone
from inward.errors import DataError
from inward.heads import store
from inward.heads.base import BackboneRef
from inward.heads.pooling import Pool
from inward.heads.running import RunningScore, running_pool, token_scores
from inward.heads.value import RejectionCurve, calibrated_for
from inward.offline.fit.runs import Runs, draw_runs
from inward.offline.fit.value import fit_value
from inward.prompts import Prompts
from inward.types import SamplingSpec
from support.corridor import FakeHead
from support.fake_services import FakeTokenizer

P, N, AT, D = 60, 8, (4, 8, 16), 12


def runs(noise=0.5, prompts=P, seed=0):
    """Rewards are one direction of the states at layer 2, beside a level of the prompt's own."""
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=(prompts, N))
    lengths = rng.integers(6, 40, size=(prompts, N))
    states = rng.normal(size=(prompts, N, len(AT), 2, D)).astype(np.float32)
    direction = rng.normal(size=D)
    direction /= np.linalg.norm(direction)
    signal = rewards[:, :, None] + noise * rng.normal(size=(prompts, N, len(AT))) * (4 / np.array(AT)) ** 0.5
    along = states[:, :, :, 1] @ direction
    states[:, :, :, 1] += ((signal - along)[..., None] * direction).astype(np.float32)
    states += rng.normal(size=(prompts, 1, 1, 1, D)).astype(np.float32)  # the prompt's own
    for a, at in enumerate(AT):
        states[:, :, a][lengths < at] = np.nan
    own = np.where(np.isnan(states[..., 0, 0]), np.nan, rng.normal(size=states.shape[:3]))
    ref = BackboneRef(name="x", fingerprint="f")
    means, groups = np.full_like(states, np.nan), np.arange(prompts)
    return Runs(AT, (1, 2), rewards, lengths, states, means, own, ref, "t", "hash", groups), direction


def test_it_finds_the_layer_and_the_direction_and_says_how_well_it_predicts():
    made, direction = runs()
    value, report = fit_value(made, head("plain", version=3, created="then"), name="value")
    assert (report.layer, report.pool) == (2, "last")
    found = value.tensors()["direction"][0]
    assert found @ direction / np.linalg.norm(found) > 0.97
    of = {"of": "plain", "of_version": 3, "of_created": "then"}
    assert of.items() <= value.manifest.options.items()
    assert value.ref.kind == "value"
    assert list(report.correlations) == sorted(report.correlations)
    assert report.correlations[-1] > 0.9 > 0.2 > max(map(abs, report.own_correlations))
    assert RejectionCurve.load(value.manifest.calibration) == report.curve


def test_it_stands_on_the_own_mean_of_the_head_where_that_says_much_already(tmp_path):
    of = head("plain", version=3, created="then")
    made = dataclasses.replace(runs(noise=1.5)[0], backbone=of.manifest.backbone, template=of.manifest.template)
    made.means_PNALD[:] = made.states_PNALD
    own = made.rewards_PN[:, :, None] + np.random.default_rng(1).normal(size=made.own_PNA.shape)
    made.own_PNA[:] = np.where(np.isnan(made.own_PNA), np.nan, own)
    value, report = fit_value(made, of, name="value")
    assert report.own_weight == pytest.approx(0.5, abs=0.25)  # two witnesses
    alone = fit_value(dataclasses.replace(made, own_PNA=np.zeros_like(own)), of, name="value")[1]
    assert all(both > max(one, other) for both, one, other in zip(
        report.correlations, alone.correlations, report.own_correlations, strict=True
    ))  # fmt: skip
    loaded = store.load(store.save(value, tmp_path / "value"))
    assert (loaded.ref.kind, len(loaded.readout.taps)) == ("value", 2)
    assert calibrated_for(loaded.manifest, of.manifest)
    assert not calibrated_for(loaded.manifest, head("plain", version=4, created="then").manifest)
    score, along = np.array([0.5, 1.5, -1.0]), np.array([2.0, 0.0, 1.0])
    said = token_scores(loaded, {0: np.stack([score, along], axis=1).astype(np.float32)})[0]
    assert said == pytest.approx(report.own_weight * score + along)
    running = RunningScore(running_pool(loaded, "", Pool(name="last"), param=""))
    assert [running.push(float(one), np.zeros(1)) for one in said][-1] == pytest.approx(said.mean())


def test_bolder_rejection_draws_less_and_loses_more_and_bad_predictions_save_little_at_the_same_loss():
    good, bad = (fit_value(runs(noise)[0], head("plain"), name="value")[1].curve for noise in (0.3, 20.0))
    drawn, losses = ([getattr(row, name) for row in good.table] for name in ("drawn", "loss"))
    assert drawn == sorted(drawn)
    assert all(later <= before + 0.005 for before, later in itertools.pairwise(losses))  # nearly
    assert losses[0] > losses[-1]
    assert all(row.loss <= row.upper for row in good.table)

    def least(curve):
        return min((row.drawn for row in curve.table if row.upper <= 0.1), default=1.0)

    assert least(good) < 0.7 < least(bad)


def test_responses_that_end_early_teach_nothing_later_and_too_few_prompts_are_refused():
    made, _ = runs(prompts=8)
    with pytest.raises(DataError, match="10 and 2"):
        fit_value(made, head("plain"), name="value")
    made, _ = runs()
    made.states_PNALD[:] = np.nan
    with pytest.raises(DataError, match="4 tokens"):
        fit_value(made, head("plain"), name="value")


async def test_runs_are_drawn_once_and_found_again(tmp_path):
    backbone, ranking = FakeBackbone(), FakeHead()
    prompts = Prompts(FakeTokenizer(), max_tokens=200)
    spec = SamplingSpec(4, max_tokens=20, seed=1)

    async def drawn(ranking=ranking):
        asked = ["one", "two", "three"]
        return await draw_runs(backbone, prompts, ranking, asked, spec, at=(2, 8), layers=(1, 4), cache=tmp_path)

    first = await drawn()
    calls = backbone.calls
    again = await drawn()
    assert backbone.calls == calls
    assert first.states_PNALD.shape == (3, 4, 2, 2, 16)
    for name in ("rewards_PN", "lengths_PN", "states_PNALD", "means_PNALD", "own_PNA"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    reached = first.lengths_PN[:, :, None] >= np.array([2, 8])
    assert (np.isfinite(first.own_PNA) == reached).all()
    anew = await drawn(FakeHead(seed=1))  # fitted again under the same name and version
    assert backbone.calls > calls and not np.array_equal(anew.rewards_PN, first.rewards_PN)
