"""Two heads on the same responses: by how much one is better, and whether that could be chance.

Both are resampled together (a paired bootstrap over prompts): what makes a prompt hard is hard for both, and the
difference is known far better than either figure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table

from inward.offline.evaluate.examples import Examples
from inward.offline.evaluate.metrics import NAMES, statistics_of
from inward.offline.evaluate.scoring import Judged
from inward.offline.evaluate.statistics import USUAL, Estimate, Resampling, Statistic
from inward.types import Doubles
from inward_client.rows import printable

COMPARED = ("pair_accuracy", "length_matched_accuracy", "auc", "macro_f1", "calibration_error", "top1_safe_rate")
"""Metrics, in the order of the table."""
LOWER = frozenset({"calibration_error", "over_refusal"})
"""Metrics of which less is better."""


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
    examples: Examples, first: Judged, second: Judged, resampling: Resampling = USUAL
) -> tuple[Difference, ...]:
    """Every metric that both have."""
    found = []
    of_first, of_second = statistics_of(examples, first), statistics_of(examples, second)
    for name in COMPARED:
        if name in of_first and name in of_second:
            (a, prompts), (b, _) = of_first[name](), of_second[name]()

            def minus(weights_BN: Doubles, a: Statistic = a, b: Statistic = b) -> Doubles:
                return b(weights_BN) - a(weights_BN)

            known = [one for one in (resampling.estimate(each, prompts) for each in (a, b, minus)) if one]
            if len(known) == 3:
                found.append(Difference(name, *known))
    return tuple(found)


def table(differences: tuple[Difference, ...], names: tuple[str, str], about: str) -> RenderableType:
    """What ``inward evaluate --compare`` prints."""
    names = printable(names[0]), printable(names[1])
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
