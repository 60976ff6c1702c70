"""A value head: one linear readout which predicts, from any token of a response that is still drawn, the reward that
another head will give it when it is finished (the prefix scorer of Controlled Decoding, arXiv 2310.17022, by ridge
regression).

What it is for is choosing among responses to one prompt. So it is fitted on differences within a prompt and a decision
point, and judged by the correlation there. Layer, pool (the last token's score, or the mean so far) and ridge are
chosen by folds over prompts; so is whether it stands on the head's own mean so far, which says much where the reward is
itself a mean over tokens: the readout then predicts what that mean does not know yet. Its calibration for early
rejection is made of predictions of prompts that were left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich.console import RenderableType
from rich.table import Table

from inward.errors import DataError
from inward.heads.base import Head, Manifest
from inward.heads.ensemble import PARTS, Part
from inward.heads.pooling import Pool
from inward.heads.rejection import Rejecting, keep_near
from inward.heads.value import KEY, Boldness, RejectionCurve, ValueHead, options_for
from inward.offline.fit import seen_prompts
from inward.offline.fit.prepare import created, record
from inward.offline.fit.runs import Runs
from inward.types import Doubles, Indices

FOLDS = 5
PROMPTS = 2 * FOLDS
"""At least."""
RIDGES = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
"""In units of the mean variance of a state's number."""
BOLDNESS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
RESAMPLES = 1000
PoolChoice = Literal["last", "mean"]


@dataclass(frozen=True, slots=True)
class ValueReport:
    """How well it predicts, and what rejecting by it costs."""

    prompts: int
    responses: int
    layer: int
    pool: PoolChoice
    ridge: float
    own_weight: float | None
    """Of the ranking head's own mean so far, where it stands on that."""
    at: tuple[int, ...]
    correlations: tuple[float, ...]
    """With the finished reward, within a prompt, at each of ``at``, on prompts that were left out."""
    own_correlations: tuple[float, ...]
    """Of the ranking head's own running score, beside it."""
    curve: RejectionCurve

    def __rich__(self) -> RenderableType:
        table = Table("after … tokens", *map(str, self.at), box=None, pad_edge=False)
        table.add_row("value head (held out)", *(f"{r:.3f}" for r in self.correlations))
        table.add_row("the head's own mean so far", *(f"{r:.3f}" for r in self.own_correlations))
        costs = Table("rejecting at", "loses of the gain (95 % at most)", "draws", box=None, pad_edge=False)
        for row in self.curve.table:
            costs.add_row(f"{row.z:g} deviations", f"{row.loss:.1%} ({row.upper:.1%})", f"{row.drawn:.1%}")
        grid = Table.grid()
        beside = "" if self.own_weight is None else f", beside {self.own_weight:.2f} x the head's own mean so far"
        grid.add_row(
            f"{self.responses} responses to {self.prompts} prompts; layer {self.layer}, pool {self.pool}, ridge "
            f"{self.ridge:g}{beside}; correlation with the finished reward within a prompt:"
        )
        for part in (table, "", costs):
            grid.add_row(part)
        return grid


def fit_value(runs: Runs, of: Head, *, name: str, seed: int = 0) -> tuple[Head, ValueReport]:
    """Fits and calibrates a value head for ``of``.

    Raises:
        DataError: too few prompts, or responses that end before the first decision point.
    """
    P, N = runs.rewards_PN.shape
    if P < PROMPTS or N < 2:
        raise DataError(f"{P} prompts with {N} responses each: a value head needs {PROMPTS} and 2 at least")
    fold_P = np.random.default_rng(seed).permutation(P) % FOLDS
    best: _Candidate | None = None
    for found in _candidates(runs, fold_P, own=of.ref.kind in PARTS):
        if math.isfinite(found.skill) and (best is None or found.skill > best.skill):
            best = found
    if best is None:
        raise DataError(
            f"no two responses of a prompt reach {runs.at[0]} tokens and differ in reward: draw longer ones"
        )
    offset = _mean(runs.rewards_PN[:, :, None] - best.inputs(runs) @ best.weight_K)
    report = ValueReport(
        P, P * N, runs.layers[best.layer], best.pool, best.ridge, best.own_weight, runs.at,
        correlations(best.values_PNA, runs.rewards_PN), correlations(runs.own_PNA, runs.rewards_PN),
        calibrate(best.values_PNA, runs, seed=seed),
    )  # fmt: skip
    return _head(runs, of, best, offset, report, name, seed), report


@dataclass(frozen=True, slots=True, eq=False)
class _Candidate:
    """A way to predict, fitted on all prompts, and what it says of prompts that were left out."""

    skill: float
    """Mean correlation with the finished reward within a prompt."""
    layer: int
    """Entry of ``Runs.layers``."""
    pool: PoolChoice
    ridge: float
    weight_K: Doubles
    """Of a state's numbers, and of the head's own mean so far, if it stands on that."""
    own: bool
    values_PNA: Doubles

    @property
    def own_weight(self) -> float | None:
        return float(self.weight_K[-1]) if self.own else None

    def inputs(self, runs: Runs) -> Doubles:
        return _inputs(runs, self.layer, self.pool, self.own)


def _candidates(runs: Runs, fold_P: Indices, *, own: bool) -> Iterator[_Candidate]:
    ways: list[tuple[PoolChoice, bool]] = [("last", False), ("mean", False)]
    if own:
        ways.append(("mean", True))
    for (pool, beside), layer in itertools.product(ways, range(len(runs.layers))):
        inputs_PNAK = _inputs(runs, layer, pool, beside)
        moments = _moments(inputs_PNAK, runs.rewards_PN)
        gram, moment = (np.sum(part, axis=0) for part in zip(*moments, strict=True))
        for ridge, values_PNA in zip(RIDGES, _held_out(inputs_PNAK, moments, fold_P, beside), strict=True):
            weight_K = _solve(gram, moment, ridge, beside)
            if not beside or weight_K[-1] > 0:
                skill = _mean(np.array(correlations(values_PNA, runs.rewards_PN)))
                yield _Candidate(skill, layer, pool, ridge, weight_K, beside, values_PNA)


def _inputs(runs: Runs, layer: int, pool: PoolChoice, own: bool) -> Doubles:
    """``[P, N, A, K]``"""
    states = (runs.states_PNALD if pool == "last" else runs.means_PNALD)[:, :, :, layer].astype(np.float64)
    return np.concatenate([states, runs.own_PNA[..., None]], axis=-1) if own else states


def _head(runs: Runs, of: Head, best: _Candidate, offset: float, report: ValueReport, name: str, seed: int) -> Head:
    fit = record(runs.data_hash, report.responses, seen_prompts.dump(runs.groups_P), seed, {
        "at": list(runs.at), "correlations": list(report.correlations),
        "own_correlations": list(report.own_correlations), "prompts": report.prompts, "ridge": best.ridge,
        "own_weight": best.own_weight,
    })  # fmt: skip
    D = runs.states_PNALD.shape[-1]
    tensors = {"direction": best.weight_K[None, :D].astype(np.float32)}
    alone = Manifest(
        name=name, kind="value", version=1, created=created(), backbone=runs.backbone, layers=(report.layer,),
        position="last", pool=Pool(name=best.pool), template=runs.template, calibration={KEY: report.curve.dump()},
        fit=fit, options={**options_for(of.manifest), "offset": offset},
    )  # fmt: skip
    if best.own_weight is None:
        return ValueHead.from_tensors(alone, tensors)
    part = alone.model_copy(update={"kind": "legend", "pool": None, "calibration": {}, "options": {"offset": offset}})
    weighed = ((of.manifest, best.own_weight), (part, 1.0))
    both = [Part(manifest=one, weight=weight, centre=0.0, spread=1.0) for one, weight in weighed]
    manifest = alone.model_copy(update={
        "layers": tuple(sorted({report.layer, *of.manifest.layers})), "final_norm": of.manifest.final_norm,
        "options": {**options_for(of.manifest), "parts": [one.model_dump(mode="json") for one in both]},
    })  # fmt: skip
    joined = {f"0.{key}": tensor for key, tensor in of.tensors().items()}
    return ValueHead.from_tensors(manifest, joined | {f"1.{key}": tensor for key, tensor in tensors.items()})


def correlations(values_PNA: Doubles, rewards_PN: Doubles) -> tuple[float, ...]:
    """With the finished reward, within a prompt, at each decision point."""
    found = []
    for a in range(values_PNA.shape[2]):
        x_PN, y_PN = _centred(values_PNA[:, :, a], rewards_PN)
        scale = math.sqrt(float(np.nansum(x_PN**2) * np.nansum(y_PN**2)))
        found.append(float(np.nansum(x_PN * y_PN)) / scale if scale > 0 else math.nan)
    return tuple(found)


def calibrate(values_PNA: Doubles, runs: Runs, *, seed: int = 0) -> RejectionCurve:
    """What rejecting by these predictions would have cost on ``runs``."""
    deviations = tuple(
        math.sqrt(_mean((y_PN - x_PN) ** 2))
        for x_PN, y_PN in (_centred(values_PNA[:, :, a], runs.rewards_PN) for a in range(len(runs.at)))
    )
    at = [a for a, deviation in enumerate(deviations) if math.isfinite(deviation)]
    points = tuple(runs.at[a] for a in at)
    kept = tuple(deviations[a] for a in at)
    gains_P = runs.rewards_PN.max(axis=1) - runs.rewards_PN.mean(axis=1)
    resampled = np.random.default_rng(seed).integers(0, len(gains_P), (RESAMPLES, len(gains_P)))
    table = []
    for z in BOLDNESS:
        gaps = [z * deviation for deviation in kept]
        losses_P, drawn_P = np.array([
            _simulated(values_PNA[p][:, at], points, gaps, runs.rewards_PN[p], runs.lengths_PN[p])
            for p in range(len(gains_P))
        ]).T  # fmt: skip
        shares = losses_P[resampled].sum(axis=1) / gains_P[resampled].sum(axis=1)
        loss, upper = float(losses_P.sum() / gains_P.sum()), float(np.quantile(shares, 0.975))
        table.append(Boldness(z, loss, upper, float(drawn_P.sum() / runs.lengths_PN.sum())))
    return RejectionCurve(points, kept, runs.rewards_PN.shape[1], tuple(table))


def _simulated(
    values_NA: Doubles, at: tuple[int, ...], gaps: list[float], rewards_N: Doubles, lengths_N: Doubles
) -> tuple[float, float]:
    """What is lost of the best reward of one prompt, and how many tokens are drawn."""
    rejecting = Rejecting(len(rewards_N), at, keep_near(gaps))
    for n, values_A in enumerate(values_NA):
        for value in values_A[np.isfinite(values_A)]:
            rejecting.reached(n, float(value))
    rejecting.ended(range(len(rewards_N)))
    rejected = rejecting.decide()
    left = [n for n in range(len(rewards_N)) if n not in rejected]
    drawn = sum(rejected[n][0] if n in rejected else int(lengths_N[n]) for n in range(len(rewards_N)))
    return float(rewards_N.max() - rewards_N[left].max()), float(drawn)


def _held_out(
    inputs_PNAK: Doubles, moments: Sequence[tuple[Doubles, Doubles]], fold_P: Indices, own: bool
) -> list[Doubles]:
    """For each of ``RIDGES`` the predictions ``[P, N, A]`` of prompts by fits without their fold."""
    grams_P, moments_P = (np.stack(part) for part in zip(*moments, strict=True))
    values = [np.full(inputs_PNAK.shape[:3], np.nan) for _ in RIDGES]
    for fold in range(FOLDS):
        train = fold_P != fold
        gram, moment = grams_P[train].sum(axis=0), moments_P[train].sum(axis=0)
        for ridge, values_PNA in zip(RIDGES, values, strict=True):
            values_PNA[~train] = inputs_PNAK[~train] @ _solve(gram, moment, ridge, own)
    return values


def _moments(inputs_PNAK: Doubles, rewards_PN: Doubles) -> list[tuple[Doubles, Doubles]]:
    """Of each prompt ``X'X`` and ``X'y`` of its differences, summed over the points."""
    found = []
    for inputs_NAK, rewards_N in zip(inputs_PNAK, rewards_PN, strict=True):
        rows, targets = [], []
        for a in range(inputs_NAK.shape[1]):
            there = np.isfinite(inputs_NAK[:, a, 0])
            if there.sum() > 1:
                rows.append(inputs_NAK[there, a] - inputs_NAK[there, a].mean(axis=0))
                targets.append(rewards_N[there] - rewards_N[there].mean())
        X = np.concatenate([np.zeros((0, inputs_NAK.shape[2])), *rows])
        found.append((X.T @ X, X.T @ np.concatenate([np.zeros(0), *targets])))
    return found


def _solve(gram_KK: Doubles, moment_K: Doubles, ridge: float, own: bool) -> Doubles:
    """The ridge is on a state's numbers, not on the head's own mean, which comes last."""
    D = len(gram_KK) - own
    penalty_K = np.full(len(gram_KK), 1e-12)
    penalty_K[:D] += ridge * np.trace(gram_KK[:D, :D]) / D
    penalty_K[D:] += 1e-9 * np.diagonal(gram_KK)[D:]
    return np.asarray(np.linalg.solve(gram_KK + np.diag(penalty_K), moment_K))


def _mean(values: Doubles) -> float:
    """Of those that are finite; NaN without any."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _centred(values_PN: Doubles, rewards_PN: Doubles) -> tuple[Doubles, Doubles]:
    """Both as differences from their prompt's mean, of the responses that have a value; NaN elsewhere."""
    there = np.isfinite(values_PN) & (np.isfinite(values_PN).sum(axis=1, keepdims=True) > 1)
    n_P1 = np.maximum(there.sum(axis=1, keepdims=True), 1)
    x, y = (np.where(there, one, 0.0) for one in (values_PN, rewards_PN))
    x, y = (np.where(there, one - one.sum(axis=1, keepdims=True) / n_P1, np.nan) for one in (x, y))
    return x, y
