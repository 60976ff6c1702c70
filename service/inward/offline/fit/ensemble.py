"""Fits the weights of an ensemble of heads (``heads.ensemble``) on pairs that the heads were, at best, not fitted on.

Weights are those of a logistic regression with no negative ones, drawn towards equal ones; how far, or whether one part
alone does better, is chosen by cross-validation over prompts: so the sum is not worse than its best part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from scipy.optimize import minimize
from scipy.special import expit

from inward.errors import DataError
from inward.heads.base import Head, Manifest
from inward.heads.ensemble import PARTS, EnsembleHead, Part
from inward.offline.data.pairs import grouped_folds
from inward.offline.fit import seen_prompts
from inward.offline.fit.prepare import calibration, created, record
from inward.offline.fit.probes import auc, both, labels, pair_accuracy
from inward.types import Doubles, Indices

FOLDS = 5
DRAWN = (0.0, 0.01, 0.1, 1.0, np.inf)
"""How strongly weights are drawn towards equal ones; infinity: they are equal."""
Rule = float | int
"""A strength of ``DRAWN``; or, as an int, the part that is taken alone."""


@dataclass(frozen=True, slots=True)
class PartSkill:
    """One part by itself, on the pairs of the fit."""

    name: str
    kind: str
    weight: float
    accuracy: float
    auc: float


@dataclass(frozen=True, slots=True)
class EnsembleReport:
    """What ``inward fit ensemble`` prints and ``Manifest.fit["metrics"]`` keeps."""

    pairs: int
    prompts: int
    accuracy: float
    """Of the sum, weights by cross-validation."""
    auc: float
    rule: str
    """How the weights came about."""
    parts: tuple[PartSkill, ...]
    warnings: tuple[str, ...] = ()

    def metrics(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        table = Table("ensemble", "kind", "weight", "accuracy", "AUC", box=None, pad_edge=False)
        for part in self.parts:
            numbers = (part.weight, part.accuracy, part.auc)
            table.add_row(part.name, part.kind, *(f"{number:.3f}" for number in numbers))
        table.add_row("the sum", self.rule, "", f"{self.accuracy:.3f}", f"{self.auc:.3f}")
        said = f"{self.pairs} pairs of {self.prompts} prompts; the sum by cross-validation of its weights"
        return Lines(table, "", said, *(f"warning: {warning}" for warning in self.warnings))


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """How parts are joined."""

    weight_P: Doubles
    centre_P: Doubles
    spread_P: Doubles
    rule: Rule
    held_out_M: Doubles
    """Sums by weights that had not seen the prompt."""


@dataclass(frozen=True, slots=True, eq=False)
class Judges:
    """The pairs that weights are fitted on."""

    groups_N: Indices
    """Rows of one prompt have one number."""
    data_hash: str

    def __len__(self) -> int:
        return len(self.groups_N)


def fit_ensemble(
    heads: Sequence[Head],
    scores_PM: Doubles,
    pairs: Judges,
    *,
    name: str = "ensemble",
    seed: int = 0,
) -> tuple[EnsembleHead, EnsembleReport]:
    """Joins heads.

    Args:
        scores_PM: ``[P, 2N]``: each head's scores of the chosen and then of the rejected responses.
        pairs: what they are of.

    Raises:
        DataError: no heads, one that ranks lists, heads of different backbones, or scores that are not finite.
    """
    _check(heads, scores_PM)
    fitted = fit_weights(scores_PM, pairs.groups_N, seed=seed)
    first = heads[0].manifest
    warnings = [warning for head in heads for warning in _flattered(head.manifest, pairs)]
    report = EnsembleReport(
        pairs=len(pairs),
        prompts=len(np.unique(pairs.groups_N)),
        accuracy=pair_accuracy(fitted.held_out_M),
        auc=auc(fitted.held_out_M),
        rule=_said(fitted.rule, heads),
        parts=tuple(
            PartSkill(head.manifest.name, head.manifest.kind, float(w), pair_accuracy(one), auc(one))
            for head, w, one in zip(heads, fitted.weight_P, scores_PM, strict=True)
        ),
        warnings=tuple(warnings),
    )
    parts = [
        Part(manifest=head.manifest, weight=w, centre=c, spread=s).model_dump(mode="json")
        for head, w, c, s in zip(heads, fitted.weight_P, fitted.centre_P, fitted.spread_P, strict=True)
    ]
    prompts = seen_prompts.dump(pairs.groups_N)
    own = Manifest(
        name=name,
        kind="ensemble",
        version=1,
        created=created(),
        backbone=first.backbone,
        layers=tuple(sorted({layer for head in heads for layer in head.manifest.layers})),
        position=first.position,
        final_norm=any(head.manifest.final_norm for head in heads),
        template=first.template,
        calibration=calibration(fitted.held_out_M),
        fit=record(pairs.data_hash, len(pairs), prompts, seed, report.metrics()),
        options={"parts": parts},
    )
    tensors = {f"{i}.{key}": tensor for i, head in enumerate(heads) for key, tensor in head.tensors().items()}
    return EnsembleHead.from_tensors(own, tensors), report


def _flattered(of: Manifest, pairs: Judges) -> Iterator[str]:
    """A warning if a part was fitted on these pairs, or on some of their prompts."""
    if pairs.data_hash and of.fit.get("data") == pairs.data_hash:
        yield f"head {of.name!r} was fitted on these very pairs, which flatters its weight"
    elif (seen := seen_prompts.seen(of, pairs.groups_N)) and seen.clear:
        yield f"{seen} of head {of.name!r}, which flatters its weight"


def fit_weights(scores_PM: Doubles, groups_N: Indices, *, seed: int = 0) -> Weights:
    """Weights for scores of some parts; sums have standard deviation 1."""
    centre_P, spread_P = scores_PM.mean(axis=1), np.maximum(scores_PM.std(axis=1), 1e-12)
    z_PM = (scores_PM - centre_P[:, None]) / spread_P[:, None]
    n = len(groups_N)
    rules: list[Rule] = [*DRAWN[::-1], *range(len(z_PM))]
    held_out: list[Doubles] = []
    parts = grouped_folds(groups_N, min(FOLDS, len(np.unique(groups_N))), seed)
    for rule in rules:
        sums_M = np.empty(2 * n)
        for train, test in parts:
            sums_M[both(test, n)] = _weights(z_PM[:, both(train, n)], rule) @ z_PM[:, both(test, n)]
        held_out.append(sums_M)
    skill = [pair_accuracy(one) + auc(one) for one in held_out]
    best = int(np.argmax(skill))  # of equal ones the first: the one nearest to equal weights
    return Weights(_weights(z_PM, rules[best]), centre_P, spread_P, rules[best], held_out[best])


def _weights(z_PM: Doubles, rule: Rule) -> Doubles:
    """``[P]``, so scaled that the sum has standard deviation 1 on these rows."""
    if isinstance(rule, int):
        weight_P = (np.arange(len(z_PM)) == rule).astype(np.float64)
    elif np.isinf(rule):
        weight_P = np.ones(len(z_PM))
    else:
        weight_P = _logistic(z_PM, rule)
    return np.asarray(weight_P / max(float((weight_P @ z_PM).std()), 1e-12))


def _logistic(z_PM: Doubles, drawn: float) -> Doubles:
    """Log loss of pairs and, half as much, of responses, over weights that are not negative."""
    n = z_PM.shape[1] // 2
    difference_PN = z_PM[:, :n] - z_PM[:, n:]
    sign_M = 2 * labels(n) - 1

    def loss(x: Doubles) -> tuple[float, Doubles]:
        weight_P, bias = x[:-1], x[-1]
        margin_N = weight_P @ difference_PN
        logit_M = sign_M * (weight_P @ z_PM + bias)
        off_P = weight_P - weight_P.mean()
        value = np.logaddexp(0, -margin_N).mean() + 0.5 * np.logaddexp(0, -logit_M).mean() + drawn * (off_P**2).sum()
        slope_N, slope_M = -expit(-margin_N) / n, -0.5 * sign_M * expit(-logit_M) / (2 * n)
        gradient_P = difference_PN @ slope_N + z_PM @ slope_M + 2 * drawn * off_P
        return float(value), np.append(gradient_P, slope_M.sum())

    start = np.append(np.ones(len(z_PM)) / len(z_PM), 0.0)
    bounds = [(0.0, None)] * len(z_PM) + [(None, None)]
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds)
    weight_P = np.asarray(found.x[:-1], dtype=np.float64)
    return weight_P if weight_P.any() else np.ones(len(z_PM))


def _check(heads: Sequence[Head], scores_PM: Doubles) -> None:
    if len(heads) < 2:
        raise DataError("an ensemble needs at least two heads")
    for head, scores_M in zip(heads, scores_PM, strict=True):
        own = head.manifest
        if own.kind not in PARTS:
            raise DataError(f"head {own.name!r} is of kind {own.kind}; only {' and '.join(PARTS)} heads add up")
        if own.backbone.fingerprint != heads[0].manifest.backbone.fingerprint:
            raise DataError(f"head {own.name!r} was fitted on another backbone than {heads[0].manifest.name!r}")
        if not np.isfinite(scores_M).all():
            raise DataError(f"head {own.name!r} gives some of these responses no finite score")


def _said(rule: Rule, heads: Sequence[Head]) -> str:
    if isinstance(rule, int):
        return f"{heads[rule].manifest.name} alone"
    return "equal weights" if np.isinf(rule) else f"logistic, drawn to equal by {rule:g}"
