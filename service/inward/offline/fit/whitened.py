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
from inward.offline.fit.legend import HELD_OUT, DirectionReport, agreement, check_position, length_matched, spearman
from inward.offline.fit.prepare import calibration, manifest
from inward.offline.fit.probes import auc, both, pair_accuracy
from inward.offline.fit.reproducible import LARGE, reproducible
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
    def groups_N(self) -> Indices:
        """The prompt of each pair, of all of them."""
        ...

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
    def groups_N(self) -> Indices:
        return self.states.groups_N

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


@dataclass(frozen=True, slots=True, kw_only=True)
class WhitenedReport(DirectionReport):
    """What ``inward fit legend --direction whitened`` prints and ``Manifest.fit["metrics"]`` keeps."""

    layers: tuple[int, ...]
    c: float
    """Shrinkage: lambda is c times the mean variance of a dimension."""
    lambda_: tuple[float, ...]
    judged: int
    """Pairs that chose shrinkage and layers; ``held_out`` is of a fifth of their prompts, had those not been asked."""
    held_out_auc: float
    cosine: float
    """Of whitened directions and mean differences, mean over the layers read."""
    mahalanobis_cosine: float
    covariance: str
    sweep: tuple[LayerWhitened, ...]

    def metrics(self) -> dict[str, Any]:
        """As JSON."""
        fields = asdict(self)
        return {"direction": "whitened", **fields, "lambda": fields.pop("lambda_")}

    def __rich__(self) -> RenderableType:
        held_out, *others = self.facts()
        facts = Table("LEGEND, whitened", f"{self.rows} pairs of {self.prompts} prompts", box=None, pad_edge=False)
        for fact in (
            ("layers", ", ".join(map(str, self.layers))),
            ("covariance", self.covariance),
            ("shrinkage c", f"{self.c:g}"),
            held_out,
            ("AUC, held out", f"{self.held_out_auc:.3f}"),
            *others,
            ("cosine with the mean difference", f"{self.cosine:.3f}  (of scores: {self.mahalanobis_cosine:.3f})"),
        ):
            facts.add_row(*fact)
        table = Table("layer", "c", "accuracy", "AUC", "weight", "cosine", box=None, pad_edge=False)
        for row in self.sweep:
            numbers = (row.accuracy, row.auc, row.weight, row.cosine)
            table.add_row(str(row.layer), f"{row.c:g}", *(f"{number:.3f}" for number in numbers))
        return Lines(facts, "", table, *(f"warning: {warning}" for warning in self.warnings))


class Chosen(NamedTuple):
    """What the judging pairs chose: entry of the shrinkages, and the weight of each layer."""

    c: int
    weight_L: Doubles


@dataclass(frozen=True, slots=True, eq=False)
class _Layers:
    """What was fitted at each layer."""

    numbers: tuple[int, ...]
    fits: tuple[Whitened, ...]
    mean_LC: Doubles
    """Score of the mean response."""
    scores_LCM: Doubles
    """Of the judging pairs' responses, in units of ``Whitened.sd_C`` about that."""

    def scales(self, chosen: Chosen) -> list[tuple[int, float]]:
        """Layers that are read, by their place, and what their unit directions are multiplied by.

        A single one keeps its unit length; those of a sum give scores of unit deviation, times their weight.
        """
        read = [int(l) for l in np.flatnonzero(chosen.weight_L)]
        if len(read) == 1:
            return [(read[0], 1.0)]
        return [(l, float(chosen.weight_L[l] / self.fits[l].sd_C[chosen.c])) for l in read]

    def joined(self, chosen: Chosen) -> Doubles:
        """``[M]``: what a head of the chosen directions gives left-out responses."""
        c = chosen.c
        parts = [scale * self.fits[l].sd_C[c] * self.scores_LCM[l, c] for l, scale in self.scales(chosen)]
        return np.asarray(np.sum(parts, axis=0))

    def sweep(self, chosen: Chosen, layer: Choice) -> Iterator[LayerWhitened]:
        for l, (number, fit, scores_CM) in enumerate(zip(self.numbers, self.fits, self.scores_LCM, strict=True)):
            c = chosen.c if layer == "sum" else _choose(scores_CM[None], "sweep").c
            yield LayerWhitened(
                number,
                fit.shrinkage[c],
                pair_accuracy(scores_CM[c]),
                auc(scores_CM[c]),
                float(chosen.weight_L[l]),
                float(fit.cosine_C[c]),
                float(fit.mahalanobis_C[c]),
            )


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
    with reproducible(seed, large=len(kept) * len(axes) * kept.width > LARGE):
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
    layers = _Layers(tuple(kept.layers[axis] for axis in axes), tuple(fits), np.stack(means), np.stack(scores))
    return _head(evidence, judges, layers, name, layer, covariance_of, seed, warnings)


def _head(
    found: Evidence,
    judges: PairSource,
    fitted: _Layers,
    name: str,
    layer: Choice,
    covariance_of: str,
    seed: int,
    warnings: Sequence[str],
) -> tuple[LegendHead, WhitenedReport]:
    """Chooses, and puts the chosen directions together."""
    kept, n = found.kept, len(judges)
    select, last = grouped_split(judges.groups_N, [1 - HELD_OUT, HELD_OUT], seed)
    blind_M = fitted.joined(_choose(fitted.scores_LCM[..., both(select, n)], layer))  # ``last`` had no say in it
    chosen = _choose(fitted.scores_LCM, layer)
    c, scales = chosen.c, fitted.scales(chosen)
    fits = [fitted.fits[l] for l, _ in scales]
    direction_LD = np.stack([scale * fitted.fits[l].direction_CD[c] for l, scale in scales])
    offset = -float(sum(scale * fitted.mean_LC[l, c] for l, scale in scales))
    scores_M = fitted.joined(chosen)
    margins_N = scores_M[:n] - scores_M[n:]
    matched, within = length_matched(margins_N, judges.length_difference_N)
    stability_B = np.mean([fit.stability_CB[c] for fit in fits], axis=0)
    low, high = (float(x) for x in np.quantile(stability_B, [0.025, 0.975]))
    layers = tuple(fitted.numbers[l] for l, _ in scales)
    report = WhitenedReport(
        layers=layers,
        c=fits[0].shrinkage[c],
        lambda_=tuple(float(fit.lambda_C[c]) for fit in fits),
        rows=len(found.groups_N),
        prompts=len(np.unique(found.groups_N)),
        judged=n,
        train=float(np.mean([fit.train_C[c] for fit in fits])),
        validation=agreement(margins_N),
        held_out=agreement((blind_M[:n] - blind_M[n:])[last]),
        held_out_auc=auc(blind_M[both(last, n)]),
        held_out_rows=len(last),
        spearman_length=spearman(margins_N, judges.length_difference_N),
        length_matched=matched,
        length_matched_within=within,
        stability=float(stability_B.mean()),
        stability_interval=(low, high),
        cosine=float(np.mean([fit.cosine_C[c] for fit in fits])),
        mahalanobis_cosine=float(np.mean([fit.mahalanobis_C[c] for fit in fits])),
        covariance=covariance_of,
        sweep=tuple(fitted.sweep(chosen, layer)),
        warnings=tuple(warnings),
    )
    direction = direction_LD[0] if len(layers) == 1 else direction_LD
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
        groups_N=found.groups_N,
        seed=seed,
        calibration=calibration(scores_M),
        metrics=report.metrics(),
        options=options,
    )
    return LegendHead(own, direction.astype(np.float32)), report


def _choose(scores_LCM: Doubles, layer: Choice) -> Chosen:
    """By left-out agreement and AUC; of a sum the shrinkage that does best on average: no single layer decides."""
    skill_LC = np.array([[pair_accuracy(one) + auc(one) for one in of_layer] for of_layer in scores_LCM])
    if layer == "sum" and len(skill_LC) > 1:
        c = int(skill_LC.mean(axis=0).argmax())
        above_L = np.array([max(auc(one) - 0.5, 1e-3) for one in scores_LCM[:, c]]) ** SKILL_POWER
        return Chosen(c, above_L / above_L.sum())
    best, c = (int(i) for i in np.unravel_index(int(skill_LC.argmax()), skill_LC.shape))
    return Chosen(c, (np.arange(len(skill_LC)) == best).astype(np.float64))


def _scores(fit: Whitened, sums: PairSums, judges: PairSource, layer: int) -> Doubles:
    """``[C, M]`` of pairs that no direction is made of."""
    scores_C2N = np.empty((len(fit.sd_C), 2, len(judges)))
    for index, *sides in blocks(judges, [layer_axis(judges.layers, layer)]):
        for side, states_NLD in enumerate(sides):
            scores_C2N[:, side, index] = ((states_NLD[:, 0] - sums.moments.mean_D) @ fit.direction_CD.T / fit.sd_C).T
    return scores_C2N.reshape(len(fit.sd_C), -1)
