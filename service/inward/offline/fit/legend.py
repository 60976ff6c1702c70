"""Fits LEGEND's standard margin vector (arXiv 2406.08124) and says how far it can be trusted.

    v = mean( h(chosen) - h(rejected) ),   for calibration rows  v = mean( h(refusal) - h(harmful) )

The paper takes the last layer after the final norm; that is the default here, and ``layer="sweep"`` chooses a layer by
validation, which is beyond the paper. Scale and bins come from validation pairs, or from cross-fitted margins: those of
a fold by the direction of the other folds. A direction flatters the rows that it was made of, and bins fitted on such
margins would be too wide for any other pair.

Of pairs that were summed while they were read (``SummedPairs``) all make the direction, and those that were kept judge
it, each by a direction without its fold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from scipy.stats import spearmanr

from inward.errors import DataError
from inward.heads.calibration import Deciles, MarginScale
from inward.heads.legend import LegendHead
from inward.offline.data.pairs import CalibrationRow, Pair, grouped_folds, grouped_split
from inward.offline.fit.prepare import calibration, manifest
from inward.offline.fit.whitening import resampled
from inward.offline.states.running_sums import SummedPairs
from inward.offline.states.saved import layer_axis
from inward.offline.states.stored import PairSource, Subset, blocks
from inward.types import Doubles, Floats

HELD_OUT = 0.2
"""Share of the prompts on which nothing is fitted or chosen until the report is written."""


@dataclass(frozen=True, slots=True)
class LayerAgreement:
    """One row of the sweep: share of margins that agree with their label."""

    layer: int
    train: float
    """Of the rows that made the direction: flattering, and the more so the fewer rows there are."""
    validation: float
    """Of pairs that did not: what the layer is chosen by."""
    separation: float
    """Mean over standard deviation of the validation margins: breaks ties."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectionReport:
    """What is told of a direction, however it was fitted; shares are those of pairs whose margins agree with their
    labels.
    """

    rows: int
    prompts: int
    train: float
    """Of the rows that made the direction: flattering."""
    validation: float
    """Of pairs that chose what had to be chosen, and did not make the direction that judges them."""
    held_out: float
    """Of pairs that neither made the direction nor chose anything: the direction's zero-shot pair accuracy."""
    held_out_rows: int
    spearman_length: float | None
    """Rank correlation of margin and length difference; near 0 is good. None where lengths are unknown or all equal."""
    length_matched: float | None
    """Agreement on the quarter of the pairs whose lengths differ least."""
    length_matched_within: float | None
    """Their largest difference, in tokens."""
    stability: float
    """Mean cosine of the direction with those of resampled prompts."""
    stability_interval: tuple[float, float]
    """95 % of these cosines."""
    warnings: tuple[str, ...] = ()

    def metrics(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def facts(self) -> list[tuple[str, str]]:
        """What each figure is, and the figure; the held-out agreement first."""
        within = "" if self.length_matched_within is None else f"  (within {self.length_matched_within:.0f} tokens)"
        low, high = self.stability_interval
        return [
            ("agreement, held out", f"{self.held_out:.3f}  ({self.held_out_rows} pairs)"),
            ("agreement, validation", f"{self.validation:.3f}"),
            ("agreement, train", f"{self.train:.3f}"),
            ("Spearman(margin, length difference)", _or_unknown(self.spearman_length, "+.3f")),
            ("agreement, length-matched", _or_unknown(self.length_matched, ".3f") + within),
            ("direction under bootstrap, cosine", f"{self.stability:.3f}  (95 %: {low:.3f} to {high:.3f})"),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class LegendReport(DirectionReport):
    """What ``inward fit legend`` prints and ``Manifest.fit["metrics"]`` keeps."""

    layer: int
    sweep: tuple[LayerAgreement, ...]

    def __rich__(self) -> RenderableType:
        about = f"layer {self.layer}, {self.rows} pairs of {self.prompts} prompts"
        facts = Table("LEGEND", about, box=None, pad_edge=False)
        for fact in self.facts():
            facts.add_row(*fact)
        layers = Table("layer", "train", "validation", "mean/std", "", box=None, pad_edge=False)
        for row in self.sweep:
            mark = "chosen" if row.layer == self.layer else ""
            layers.add_row(str(row.layer), f"{row.train:.3f}", f"{row.validation:.3f}", f"{row.separation:+.2f}", mark)
        return Lines(facts, "", layers, *(f"warning: {warning}" for warning in self.warnings))


class Rest(NamedTuple):
    """Pairs that make directions and judge none, at one layer."""

    difference_D: Doubles | float
    """Sum over them of chosen minus rejected."""
    pairs: float


NONE = Rest(0.0, 0.0)


def fit_legend(
    states: PairSource | SummedPairs,
    *,
    name: str = "legend",
    layer: int | Literal["sweep"] | None = None,
    validation: PairSource | None = None,
    folds: int = 5,
    bootstraps: int = 200,
    seed: int = 0,
    warnings: Sequence[str] = (),
) -> tuple[LegendHead, LegendReport]:
    """Fits the direction on all of ``states``, after judging it by directions that had not seen the judged pairs.

    States are read one layer at a time, so that memory does not grow with the layers.

    Args:
        states: calibration rows (refusal as chosen, harmful answer as rejected) or labelled pairs.
        layer: None takes the last of ``states.layers``.
        validation: labelled pairs with the same layers that choose the layer, give the reported agreement, and say how
            large a margin is (scale, bins, probabilities): that of a refusal over a harmful answer is larger than most.
            Without them all of this comes from ``states``, by cross-validation and from prompts held out of it.
        folds: of the cross-fitting; fewer where there are fewer prompts.
        warnings: to be printed with the report (see ``constant_refusal``).

    Raises:
        DataError: too few prompts, no such layer, or states without a difference between chosen and rejected.
    """
    found, states = (states, states.kept) if isinstance(states, SummedPairs) else (None, states)
    rest = {} if found is None else {k: _rest(found, k) for k in states.layers}
    groups_N = (found or states).groups_N
    prompts = len(np.unique(groups_N))
    candidates = states.layers if layer == "sweep" else (states.layers[-1] if layer is None else layer,)
    if validation is not None:
        check_position(validation, states)
    judges = states if validation is None else validation
    most, last = (Subset(judges, part) for part in grouped_split(judges.groups_N, [1 - HELD_OUT, HELD_OUT], seed))
    develop, select = (most, None) if validation is None else (states, most)
    table = tuple(_judge(develop, select, k, folds, seed, rest.get(k, NONE)) for k in candidates)
    best = max(table, key=lambda row: (row.validation, row.separation))
    others = rest.get(best.layer, NONE)
    direction_D = _direction(_differences(states, best.layer), others)
    margins_N = _crossfitted(states, best.layer, folds, seed, others)
    matched, within = length_matched(margins_N, states.length_difference_N)
    low, mean, high = _stability(states, best.layer, direction_D, bootstraps, seed, others, prompts)
    report = LegendReport(
        layer=best.layer,
        rows=len(groups_N),
        prompts=prompts,
        train=best.train,
        validation=best.validation,
        held_out=agreement(_differences(last, best.layer) @ _direction(_differences(develop, best.layer), others)),
        held_out_rows=len(last),
        spearman_length=spearman(margins_N, states.length_difference_N),
        length_matched=matched,
        length_matched_within=within,
        stability=mean,
        stability_interval=(low, high),
        sweep=table,
        warnings=tuple(warnings),
    )
    if validation is not None:  # pairs as they are annotated, which the direction was not made of
        calibrated = calibration(_scores(validation, best.layer, direction_D))
    else:
        # Scores lie where the final direction puts them; directions of folds would shift them, because projections are
        # not centred.
        scores_2N = _scores(states, best.layer, direction_D)
        calibrated = MarginScale.fit(margins_N).dump() | Deciles.fit(scores_2N).dump()
    head = LegendHead(
        manifest(
            name,
            "legend",
            states,
            [best.layer],
            groups_N=groups_N,
            seed=seed,
            calibration=calibrated,
            metrics=report.metrics(),
        ),
        direction_D.astype(np.float32),
    )
    return head, report


def check_position(validation: PairSource, states: PairSource) -> None:
    """Raises ``DataError`` where they were read at different positions."""
    other, own = validation.origin.position, states.origin.position
    if other != own:
        raise DataError(f"the validation states are of position {other!r}, the others of {own!r}")


def constant_refusal(rows: Sequence[CalibrationRow | Pair]) -> list[str]:
    """A warning if all refusals (chosen responses) are one sentence, as in the paper."""
    chosen = {row.refusal if isinstance(row, CalibrationRow) else row.chosen for row in rows}
    if len(rows) < 2 or len(chosen) > 1:
        return []
    return [
        f"all {len(rows)} refusals are the same sentence ({chosen.pop()[:60]!r}): at the last token the direction "
        "then also encodes 'ends with this sentence'; refusals of several wordings, or a sweep on labelled "
        "validation pairs, show how much"
    ]


def _rest(found: SummedPairs, layer: int) -> Rest:
    """Of what was summed all that was not kept."""
    kept, axis = found.kept, layer_axis(found.kept.layers, layer)
    if len(kept) == len(found.groups_N):
        return NONE
    sums = found.sums(axis)
    chosen_D, rejected_D = (
        states[:, 0].sum(axis=0, dtype=np.float64) for states in kept.take(np.arange(len(kept)), [axis])
    )
    return Rest(sums.difference_D - (chosen_D - rejected_D), sums.pairs - len(kept))


def _judge(
    train: PairSource, validation: PairSource | None, layer: int, folds: int, seed: int, rest: Rest
) -> LayerAgreement:
    """Agreement of one layer's direction on ``validation``, or by cross-validation where there is none."""
    differences_ND = _differences(train, layer)
    direction_D = _direction(differences_ND, rest)
    if validation is None:
        judged_M: Floats | Doubles = _crossfitted(train, layer, folds, seed, rest)
    else:
        judged_M = _differences(validation, layer) @ direction_D
    separation = float(judged_M.mean() / max(float(judged_M.std()), 1e-30))
    return LayerAgreement(layer, agreement(differences_ND @ direction_D), agreement(judged_M), separation)


def _crossfitted(states: PairSource, layer: int, folds: int, seed: int, rest: Rest) -> Doubles:
    """``[N]``: each pair's margin by the direction of folds that its prompt is not in."""
    differences_ND = _differences(states, layer)
    margins_N = np.empty(len(states))
    for train, held_out in grouped_folds(states.groups_N, min(folds, len(np.unique(states.groups_N))), seed):
        margins_N[held_out] = differences_ND[held_out] @ _direction(differences_ND[train], rest)
    return margins_N


def _differences(states: PairSource, layer: int) -> Floats:
    """``[N, D]``: chosen minus rejected."""
    axis = layer_axis(states.layers, layer)
    differences_ND = np.empty((len(states), states.width), dtype=np.float32)
    for index, chosen, rejected in blocks(states, [axis]):
        np.subtract(chosen[:, 0], rejected[:, 0], out=differences_ND[index[0] : index[-1] + 1])
    return differences_ND


def _scores(states: PairSource, layer: int, direction_D: Floats) -> Doubles:
    """``[2N]``: of the chosen and then of the rejected states."""
    scores_2N = np.empty((2, len(states)))
    for index, *sides in blocks(states, [layer_axis(states.layers, layer)]):
        for side, states_NLD in enumerate(sides):
            scores_2N[side, index] = states_NLD[:, 0] @ direction_D
    return scores_2N.ravel()


def _direction(differences_ND: Floats, rest: Rest) -> Floats:
    """Unit mean difference ``[D]`` of some pairs and the rest."""
    sum_D = differences_ND.sum(axis=0, dtype=np.float64) + rest.difference_D
    mean_D = sum_D / max(len(differences_ND) + rest.pairs, 1.0)
    length = float(np.linalg.norm(mean_D))
    if length == 0:
        raise DataError(
            "chosen and rejected states do not differ on average: there is no direction; are the responses the same?"
        )
    return np.asarray(mean_D / length, dtype=np.float32)


def agreement(margins_N: Floats | Doubles) -> float:
    return float((margins_N > 0).mean())


def spearman(margins_N: Doubles, length_difference_N: Doubles | None) -> float | None:
    if length_difference_N is None or len(np.unique(length_difference_N)) < 2 or len(np.unique(margins_N)) < 2:
        return None
    return float(spearmanr(margins_N, length_difference_N).statistic)


def length_matched(margins_N: Doubles, length_difference_N: Doubles | None) -> tuple[float | None, float | None]:
    """Agreement on the quarter of the pairs with the most equal lengths, and how unequal these are."""
    if length_difference_N is None:
        return None, None
    within = float(np.quantile(np.abs(length_difference_N), 0.25, method="lower"))
    return agreement(margins_N[np.abs(length_difference_N) <= within]), within


def _stability(
    states: PairSource, layer: int, direction_D: Floats, bootstraps: int, seed: int, rest: Rest, prompts: int
) -> tuple[float, float, float]:
    """Cosines of directions of resampled prompts with the direction: 2.5 % quantile, mean, 97.5 % quantile. With a
    rest those that are kept are resampled, and what that changes counts as it would for all ``prompts``.
    """
    differences_ND = _differences(states, layer)
    resampled_BD = resampled(differences_ND, states.groups_N, bootstraps, seed)
    if rest.pairs:
        kept_D = differences_ND.sum(axis=0, dtype=np.float64)
        more = np.sqrt(prompts / len(np.unique(states.groups_N)))
        resampled_BD = kept_D + rest.difference_D + (resampled_BD - kept_D) * more
    cosines_B = resampled_BD @ direction_D / np.maximum(np.linalg.norm(resampled_BD, axis=1), 1e-30)
    low, high = np.quantile(cosines_B, [0.025, 0.975])
    return float(low), float(cosines_B.mean()), float(high)


def _or_unknown(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)
