"""Fits LEGEND heads with whitened directions (``whitening``): still no training, one linear solve a layer.

The strength of the shrinkage, and the layer or the weights of the layers, are chosen by pairs that are each judged by a
direction made without their prompt. Whatever the number of pairs, that is done on at most ``KEPT_PAIRS`` of them; the
directions are made of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from tqdm import tqdm

from inward.heads.legend import LegendHead
from inward.offline.data.pairs import grouped_split, whole_prompts
from inward.offline.fit.legend import HELD_OUT, agreement, check_position, length_matched, or_unknown, spearman
from inward.offline.fit.prepare import calibration, manifest
from inward.offline.fit.probes import auc, both, pair_accuracy
from inward.offline.fit.reproducible import reproducible
from inward.offline.fit.whitening import SHRINKAGE, Whitened, in_span, whiten
from inward.offline.states.moments import Moments, PairSums
from inward.offline.states.read import KEPT_PAIRS
from inward.offline.states.saved import layer_axis
from inward.offline.states.stored import PairSource, Subset, blocks
from inward.types import Doubles, Indices

Choice = int | Literal["sum", "sweep"]
SKILL_POWER = 2
"""Weight of a layer in a sum: its left-out AUC above chance, to this power. 0 would be a plain sum: as good where all
layers know (Llama-2-7B), worse where the early ones don't.
"""


class Evidence(Protocol):
    """What a fit is made of: sums over all pairs, and some pairs to judge by."""

    @property
    def kept(self) -> PairSource:
        """Pairs that judge, with all pairs of their prompts; it also says where all of them are from."""
        ...

    @property
    def pairs(self) -> int: ...
    @property
    def prompts(self) -> int: ...

    def sums(self, axis: int) -> PairSums:
        """Of all pairs, at one entry of ``kept.layers``."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class FromStates:
    """Evidence of states that are there, in memory or in a file: one layer of them at a time."""

    states: PairSource
    index_N: Indices
    """Of the pairs that judge."""

    @classmethod
    def of(cls, states: PairSource, *, most: int = KEPT_PAIRS) -> FromStates:
        """Takes whole prompts until there are ``most`` pairs."""
        return cls(states, whole_prompts(states.groups_N, most))

    @property
    def kept(self) -> PairSource:
        return self.states if len(self.index_N) == len(self.states) else Subset(self.states, self.index_N)

    @property
    def pairs(self) -> int:
        return len(self.states)

    @property
    def prompts(self) -> int:
        return len(np.unique(self.states.groups_N))

    def sums(self, axis: int) -> PairSums:
        span = in_span(len(self.index_N), len(self.states), self.states.width // 2)
        sums = PairSums.empty(self.states.width, None if span else np.float64)
        for _, chosen, rejected in blocks(self.states, [axis]):
            sums.add(chosen[:, 0], rejected[:, 0])
        return sums


@dataclass(frozen=True, slots=True)
class LayerWhitened:
    """One layer by itself, its shrinkage chosen for it, on left-out prompts."""

    layer: int
    c: float
    accuracy: float
    auc: float
    weight: float
    """Its share of the score."""
    cosine: float
    """Of whitened and mean difference."""
    mahalanobis_cosine: float
    """The correlation of their scores."""


@dataclass(frozen=True, slots=True)
class WhitenedReport:
    """What ``inward fit legend --direction whitened`` prints and ``Manifest.fit["metrics"]`` keeps."""

    layers: tuple[int, ...]
    c: float
    """Shrinkage: lambda is c times the mean variance of a dimension."""
    lambda_: tuple[float, ...]
    rows: int
    prompts: int
    judged: int
    """Pairs that chose and judged."""
    train: float
    validation: float
    """Agreement of the pairs that chose shrinkage and layers, each left out of its own direction."""
    held_out: float
    """Agreement on a fifth of the prompts, had they not been asked for that choice: the zero-shot pair accuracy."""
    held_out_auc: float
    held_out_rows: int
    spearman_length: float | None
    length_matched: float | None
    length_matched_within: float | None
    stability: float
    """Mean cosine of the directions with those of resampled prompts."""
    stability_interval: tuple[float, float]
    cosine: float
    """Of whitened directions and mean differences, mean over the layers read."""
    mahalanobis_cosine: float
    covariance: str
    sweep: tuple[LayerWhitened, ...]
    warnings: tuple[str, ...] = ()

    def metrics(self) -> dict[str, Any]:
        """As JSON."""
        fields = asdict(self)
        return {"direction": "whitened", **fields, "lambda": fields.pop("lambda_")}

    def __rich__(self) -> RenderableType:
        read = ", ".join(map(str, self.layers))
        facts = Table("LEGEND, whitened", f"{self.rows} pairs of {self.prompts} prompts", box=None, pad_edge=False)
        facts.add_row("layers", read)
        facts.add_row("covariance", self.covariance)
        facts.add_row("shrinkage c", f"{self.c:g}")
        facts.add_row("agreement, held out", f"{self.held_out:.3f}  ({self.held_out_rows} pairs)")
        facts.add_row("AUC, held out", f"{self.held_out_auc:.3f}")
        facts.add_row("agreement, validation", f"{self.validation:.3f}")
        facts.add_row("agreement, train", f"{self.train:.3f}")
        facts.add_row("Spearman(margin, length difference)", or_unknown(self.spearman_length, "+.3f"))
        within = "" if self.length_matched_within is None else f"  (within {self.length_matched_within:.0f} tokens)"
        facts.add_row("agreement, length-matched", or_unknown(self.length_matched, ".3f") + within)
        low, high = self.stability_interval
        facts.add_row("direction under bootstrap, cosine", f"{self.stability:.3f}  (95 %: {low:.3f} to {high:.3f})")
        facts.add_row(
            "cosine with the mean difference", f"{self.cosine:.3f}  (of scores: {self.mahalanobis_cosine:.3f})"
        )
        table = Table("layer", "c", "accuracy", "AUC", "weight", "cosine", box=None, pad_edge=False)
        for row in self.sweep:
            numbers = (row.accuracy, row.auc, row.weight, row.cosine)
            table.add_row(str(row.layer), f"{row.c:g}", *(f"{number:.3f}" for number in numbers))
        return Lines(facts, "", table, *(f"warning: {warning}" for warning in self.warnings))


class Chosen(NamedTuple):
    """What the judging pairs chose: entry of the shrinkages, and the weight of each layer."""

    c: int
    weight_L: Doubles


def fit_whitened(
    evidence: Evidence,
    *,
    name: str = "legend",
    layer: Choice = "sum",
    covariance: Sequence[Moments] | None = None,
    covariance_of: str = "the pairs themselves",
    validation: PairSource | None = None,
    shrinkage: Sequence[float] = SHRINKAGE,
    bootstraps: int = 200,
    seed: int = 0,
    progress: bool = False,
    warnings: Sequence[str] = (),
) -> tuple[LegendHead, WhitenedReport]:
    """Fits directions of all pairs, and chooses by left-out ones.

    Args:
        evidence: ``FromStates``, or ``states.running_sums.SummedPairs`` made of texts.
        layer: a number; ``sweep``: the best one; ``sum``: all, standardised and weighted by their skill.
        covariance: of other responses at the same layers, labelled or not; None: of the pairs themselves.
        covariance_of: what to call them in the report.
        validation: other labelled pairs at the same layers that choose and judge in place of left-out ones.
        progress: show a bar.

    Raises:
        DataError: too few prompts, no such layer, or states without a difference between chosen and rejected.
    """
    kept = evidence.kept
    judges = kept if validation is None else validation
    check_position(judges, kept)
    if isinstance(layer, int):
        layer_axis(kept.layers, layer)
    axes = [axis for axis, k in enumerate(kept.layers) if layer in (k, "sum", "sweep") and (k > 0 or layer == 0)]
    every = np.arange(len(kept), dtype=np.int64)
    fits: list[Whitened] = []
    means: list[Doubles] = []
    scores: list[Doubles] = []
    with reproducible(seed):
        for axis in tqdm(axes, desc="fit legend", unit="layer", disable=not progress):
            sums = evidence.sums(axis)
            chosen, rejected = (states[:, 0] for states in kept.take(every, [axis]))
            fit = whiten(
                sums,
                chosen,
                rejected,
                kept.groups_N,
                covariance=None if covariance is None else covariance[axis],
                shrinkage=shrinkage,
                bootstraps=bootstraps,
                seed=seed,
            )
            fits.append(fit)
            means.append(fit.direction_CD @ sums.moments.mean_D)
            scores.append(fit.scores_CM if validation is None else _scores(fit, sums, validation, kept.layers[axis]))
    return _head(
        evidence, judges, axes, fits, np.stack(means), np.stack(scores), name, layer, covariance_of, seed, warnings
    )


def _head(
    found: Evidence,
    judges: PairSource,
    axes: Sequence[int],
    fits: Sequence[Whitened],
    mean_LC: Doubles,
    scores_LCM: Doubles,
    name: str,
    layer: Choice,
    covariance_of: str,
    seed: int,
    warnings: Sequence[str],
) -> tuple[LegendHead, WhitenedReport]:
    """Chooses, and puts the chosen directions together."""
    kept, n = found.kept, len(judges)
    select, last = grouped_split(judges.groups_N, [1 - HELD_OUT, HELD_OUT], seed)
    blind_M = _joined(fits, scores_LCM, _choose(scores_LCM[..., both(select, n)], layer))  # ``last`` had no say in it
    chosen = _choose(scores_LCM, layer)
    c = chosen.c
    read = [l for l, _ in _scales(fits, chosen)]
    direction_LD = np.stack([scale * fits[l].direction_CD[c] for l, scale in _scales(fits, chosen)])
    offset = -float(sum(scale * mean_LC[l, c] for l, scale in _scales(fits, chosen)))
    scores_M = _joined(fits, scores_LCM, chosen)
    margins_N = scores_M[:n] - scores_M[n:]
    matched, within = length_matched(margins_N, judges.length_difference_N)
    stability_B = np.mean([fits[l].stability_CB[c] for l in read], axis=0)
    low, high = (float(x) for x in np.quantile(stability_B, [0.025, 0.975]))
    layers = tuple(kept.layers[axes[l]] for l in read)
    report = WhitenedReport(
        layers=layers,
        c=fits[0].shrinkage[c],
        lambda_=tuple(float(fits[l].lambda_C[c]) for l in read),
        rows=found.pairs,
        prompts=found.prompts,
        judged=n,
        train=float(np.mean([fits[l].train_C[c] for l in read])),
        validation=agreement(margins_N),
        held_out=agreement((blind_M[:n] - blind_M[n:])[last]),
        held_out_auc=auc(blind_M[both(last, n)]),
        held_out_rows=len(last),
        spearman_length=spearman(margins_N, judges.length_difference_N),
        length_matched=matched,
        length_matched_within=within,
        stability=float(stability_B.mean()),
        stability_interval=(low, high),
        cosine=float(np.mean([fits[l].cosine_C[c] for l in read])),
        mahalanobis_cosine=float(np.mean([fits[l].mahalanobis_C[c] for l in read])),
        covariance=covariance_of,
        sweep=tuple(_sweep(kept.layers, axes, fits, scores_LCM, chosen, layer)),
        warnings=tuple(warnings),
    )
    direction = direction_LD[0] if len(read) == 1 else direction_LD
    options = {
        "direction": "whitened",
        "c": report.c,
        "lambda": list(report.lambda_),
        "covariance": covariance_of,
        "offset": offset,
        "cosine": report.cosine,
        "mahalanobis_cosine": report.mahalanobis_cosine,
    }
    own = manifest(
        name,
        "legend",
        kept,
        layers,
        rows=found.pairs,
        seed=seed,
        calibration=calibration(scores_M),
        metrics=report.metrics(),
        options=options,
    )
    return LegendHead(own, direction.astype(np.float32)), report


def _scales(fits: Sequence[Whitened], chosen: Chosen) -> list[tuple[int, float]]:
    """Layers that are read, and what their unit directions are multiplied by.

    A single one keeps its unit length; those of a sum give scores of unit deviation, times their weight.
    """
    read = [int(l) for l in np.flatnonzero(chosen.weight_L)]
    if len(read) == 1:
        return [(read[0], 1.0)]
    return [(l, float(chosen.weight_L[l] / fits[l].sd_C[chosen.c])) for l in read]


def _joined(fits: Sequence[Whitened], scores_LCM: Doubles, chosen: Chosen) -> Doubles:
    """``[M]``: what a head of the chosen directions gives left-out responses."""
    parts = [scale * fits[l].sd_C[chosen.c] * scores_LCM[l, chosen.c] for l, scale in _scales(fits, chosen)]
    return np.asarray(np.sum(parts, axis=0))


def _choose(scores_LCM: Doubles, layer: Choice) -> Chosen:
    """By left-out agreement and AUC; of a sum the shrinkage that does best on average: no single layer decides."""
    skill_LC = np.array([[pair_accuracy(one) + auc(one) for one in of_layer] for of_layer in scores_LCM])
    if layer == "sum" and len(skill_LC) > 1:
        c = int(skill_LC.mean(axis=0).argmax())
        above_L = np.array([max(auc(one) - 0.5, 1e-3) for one in scores_LCM[:, c]]) ** SKILL_POWER
        return Chosen(c, above_L / above_L.sum())
    best, c = (int(i) for i in np.unravel_index(int(skill_LC.argmax()), skill_LC.shape))
    return Chosen(c, (np.arange(len(skill_LC)) == best).astype(np.float64))


def _sweep(
    layers: Sequence[int],
    axes: Sequence[int],
    fits: Sequence[Whitened],
    scores_LCM: Doubles,
    chosen: Chosen,
    layer: Choice,
) -> Iterator[LayerWhitened]:
    for l, fit in enumerate(fits):
        own = chosen.c if layer == "sum" else _choose(scores_LCM[l : l + 1], "sweep").c
        yield LayerWhitened(
            layers[axes[l]],
            fit.shrinkage[own],
            pair_accuracy(scores_LCM[l, own]),
            auc(scores_LCM[l, own]),
            float(chosen.weight_L[l]),
            float(fit.cosine_C[own]),
            float(fit.mahalanobis_C[own]),
        )


def _scores(fit: Whitened, sums: PairSums, judges: PairSource, layer: int) -> Doubles:
    """``[C, M]`` of pairs that no direction is made of."""
    axis = layer_axis(judges.layers, layer)
    parts = [
        (np.concatenate([chosen, rejected])[:, 0] - sums.moments.mean_D) @ fit.direction_CD.T / fit.sd_C
        for _, chosen, rejected in blocks(judges, [axis])
    ]
    sizes = [len(part) // 2 for part in parts]
    chosen = [part[:n] for part, n in zip(parts, sizes, strict=True)]
    rejected = [part[n:] for part, n in zip(parts, sizes, strict=True)]
    return np.concatenate([*chosen, *rejected]).T
