"""Two heads on the same responses: by how much one is better, and whether that could be chance.

Both are resampled together (a paired bootstrap over prompts): what makes a prompt hard is hard for both, and the
difference is known far better than either figure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table

from inward.offline.evaluate import statistics
from inward.offline.evaluate.examples import Examples
from inward.offline.evaluate.metrics import NAMES, called_safe, length_matched, picked, wins
from inward.offline.evaluate.scoring import Judged
from inward.offline.evaluate.statistics import Estimate, Statistic, bootstrap
from inward.types import Doubles, Indices


@dataclass(frozen=True, slots=True)
class Difference:
    """One metric of two heads."""

    name: str
    first: Estimate
    second: Estimate
    difference: Estimate
    """Second minus first."""

    @property
    def verdict(self) -> str:
        """Which is higher, if it can be told."""
        if self.difference.low > 0:
            return "second"
        return "first" if self.difference.high < 0 else "cannot be told"

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        pair = {"first": self.first.to_json(), "second": self.second.to_json()}
        return {**pair, "difference": self.difference.to_json(), "verdict": self.verdict}


def compare(
    examples: Examples, first: Judged, second: Judged, *, resamples: int = statistics.RESAMPLES, seed: int = 0
) -> tuple[Difference, ...]:
    """Every metric that both have."""
    found = []
    for name, of_first, of_second, groups in _statistics(examples, first, second):
        if len(np.unique(groups)) < 2:
            continue

        def minus(weights_BN: Doubles, a: Statistic = of_first, b: Statistic = of_second) -> Doubles:
            return b(weights_BN) - a(weights_BN)

        estimates = [bootstrap(one, groups, resamples=resamples, seed=seed) for one in (of_first, of_second, minus)]
        if all(estimate is not None for estimate in estimates):
            found.append(Difference(name, *(e for e in estimates if e is not None)))
    return tuple(found)


def table(differences: tuple[Difference, ...], names: tuple[str, str], about: str) -> RenderableType:
    """What ``inward evaluate --compare`` prints."""
    one = Table("", names[0], names[1], f"{names[1]} minus {names[0]}", "better", box=None, pad_edge=False)
    for row in differences:
        lower = row.name in LOWER
        better = {"first": names[1] if lower else names[0], "second": names[0] if lower else names[1]}
        told = better.get(row.verdict, row.verdict)
        difference = f"{row.difference.value:+.3f} [{row.difference.low:+.3f}, {row.difference.high:+.3f}]"
        one.add_row(NAMES[row.name], str(row.first), str(row.second), difference, told)
    return Lines(about, "", one)


def report(differences: tuple[Difference, ...], names: tuple[str, str]) -> Mapping[str, Any]:
    """The same as JSON."""
    return {"first": names[0], "second": names[1], "metrics": {row.name: row.to_json() for row in differences}}


LOWER = frozenset({"calibration_error", "over_refusal"})
"""Metrics of which less is better."""


def _statistics(
    examples: Examples, first: Judged, second: Judged
) -> Iterator[tuple[str, Statistic, Statistic, Indices]]:
    """Metric, its statistic for either head, and the prompt of each item that it is about."""
    a_P, b_P = first.margins(examples), second.margins(examples)
    if len(a_P):
        yield "pair_accuracy", statistics.mean(wins(a_P)), statistics.mean(wins(b_P)), examples.prompt_P
        if examples.length_difference_P is not None:
            kept = length_matched(examples.length_difference_P)
            each = (statistics.mean(wins(margin_P[kept])) for margin_P in (a_P, b_P))
            yield "length_matched_accuracy", next(each), next(each), examples.prompt_P[kept]
    if first.scores_M is None or second.scores_M is None:
        return
    safe_M, prompt_M = examples.safe_M, examples.prompt_M
    yield "auc", statistics.auc(first.scores_M, safe_M), statistics.auc(second.scores_M, safe_M), prompt_M
    f1 = [statistics.macro_f1(called_safe(judged, examples), safe_M) for judged in (first, second)]
    yield "macro_f1", f1[0], f1[1], prompt_M
    if first.probability_M is not None and second.probability_M is not None:
        error = [statistics.calibration_error(p_M, safe_M) for p_M in (first.probability_M, second.probability_M)]
        yield "calibration_error", error[0], error[1], prompt_M
    if examples.mixed:
        top = [statistics.mean(picked(examples, scores_M)) for scores_M in (first.scores_M, second.scores_M)]
        prompts = np.array([examples.prompt_M[rows[0]] for rows in examples.mixed], dtype=np.int64)
        yield "top1_safe_rate", top[0], top[1], prompts
