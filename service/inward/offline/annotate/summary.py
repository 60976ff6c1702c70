"""What an annotated dataset looks like: how many labels look flipped, how the margins are spread, which pairs to
look at first.
"""

from __future__ import annotations

import heapq
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inward.offline.annotate.duplicates import hashed
from inward.offline.annotate.options import PageOf
from inward.offline.annotate.quality import Quality
from inward.offline.annotate.scorer import Annotated, Columns
from inward.types import Doubles, Indices
from inward_client.rows import DataError, Pair, PairReader, Row, Source, as_turns

BARS = 15
WIDTH = 44
"""Characters of the longest bar."""
MOST_REASONS = 5
LEFT_OUT = Annotated(None, "not asked for")
COUNTED = re.compile(r"'[^']*'|(\d[\d,]*)")
"""A number in a reason that differs from row to row; what stands in quotation marks is a name."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Of all rows of a job."""

    rows: int
    annotated: int
    truncated: int
    flipped: int
    """Pairs whose margin is negative: the label looks the wrong way round."""
    ties: int
    """Pairs without a verdict: both answers are the same."""
    margin_N: NDArray[np.float32]
    """Margins of the annotated rows."""
    confidence: float | None
    """Mean, where confidences are given."""
    reasons: tuple[tuple[str, int], ...]
    """Why rows were left out, the most frequent first."""
    unrated: int = 0
    """Annotated rows without a label probability, which not every head gives."""

    @property
    def rejected(self) -> int:
        return self.rows - self.annotated

    def to_json(self) -> dict[str, Any]:
        """Without the single margins."""
        quantiles = [0.05, 0.25, 0.5, 0.75, 0.95]
        spread = np.quantile(self.margin_N, quantiles).tolist() if self.annotated else [None] * len(quantiles)
        return {
            "rows": self.rows, "annotated": self.annotated, "rejected": self.rejected, "truncated": self.truncated,
            "flipped": self.flipped, "ties": self.ties,
            "label_agreement": 1 - self.flipped / (self.annotated - self.ties) if self.annotated > self.ties else None,
            "margin": {
                "mean": float(self.margin_N.mean(dtype=np.float64)) if self.annotated else None,
                "std": float(self.margin_N.std(dtype=np.float64)) if self.annotated else None,
                "quantiles": dict(zip(map(str, quantiles), spread, strict=True)),
            },
            "mean_confidence": self.confidence,
            "reasons": [{"reason": reason, "rows": rows} for reason, rows in self.reasons],
        }  # fmt: skip

    def text(self, quality: Quality | None = None) -> str:
        """A few lines for the terminal."""
        lines = [
            f"{self.annotated:,} of {self.rows:,} pairs annotated"
            + (f", {self.truncated:,} of them cut" if self.truncated else "")
        ]
        lines += [f"  {rows:,} × {reason}" for reason, rows in self.reasons]
        if self.annotated:
            judged = max(self.annotated - self.ties, 1)
            lines.append(f"{self.flipped:,} labels are contradicted by the head ({self.flipped / judged:.1%})")
            lines += quality.text() if quality else []
            if self.ties:
                lines.append(f"{self.ties:,} pairs are ties: both answers are the same")
            if self.confidence is not None:
                lines.append(f"mean confidence {self.confidence:.3f}")
            lines += ["", "margin", *histogram(self.margin_N)]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which annotated rows are written.

    Args:
        only_flipped: those whose label the head contradicts.
        least: label probability; a row without one is written.
    """

    only_flipped: bool = False
    least: float | None = None

    def or_left_out(self, one: Annotated) -> Annotated:
        """The row, or one that has no columns."""
        if one.columns is None or (self.only_flipped and one.columns["label_agrees"] is not False):
            return LEFT_OUT
        probability = one.columns.get("label_probability")
        low = self.least is not None and probability is not None and probability < self.least
        return LEFT_OUT if low else one


@dataclass(frozen=True, slots=True)
class Picked:
    """A pair to look at."""

    source: str
    row: int
    """Of its source, from 1."""
    pair: Pair
    columns: Columns
    rest: Row = field(default_factory=dict)
    """What else the row holds."""


def summarise(results: Iterable[Annotated]) -> Summary:
    """One pass over what became of all rows."""
    rows = truncated = flipped = ties = sure = unrated = 0
    total = 0.0
    margins = array("f")
    reasons: Counter[str] = Counter()
    for one in results:
        rows += 1
        if one.columns is None:
            reasons[one.error or "unknown"] += 1
            continue
        truncated += one.truncated
        flipped += one.columns["label_agrees"] is False
        ties += one.columns["label_agrees"] is None
        unrated += one.columns.get("label_probability") is None
        margins.append(one.columns["margin"] or 0.0)
        if (confidence := one.columns["confidence"]) is not None:
            sure, total = sure + 1, total + confidence
    margin_N, confidence = np.array(margins, dtype=np.float32), total / sure if sure else None
    return Summary(rows, len(margin_N), truncated, flipped, ties, margin_N, confidence, _common(reasons), unrated)


def pick(
    sources: Sequence[Source],
    results: Callable[[Source], Iterable[Annotated]],
    reader: PairReader,
    most: int,
    of: PageOf = "suspicious",
) -> list[Picked]:
    """At most ``most`` pairs: those whose margins contradict their labels most, smallest margin first, and no others;
    or a sample of all, which a hash draws. Held are these, however many rows there are.
    """

    def places() -> Iterator[tuple[float, int, int, Annotated]]:
        for number, source in enumerate(sources):
            for row, one in enumerate(results(source)):
                if one.columns is None:
                    continue
                if of == "sample":
                    yield float(hashed(source.name, str(row))), number, row, one
                elif one.columns["label_agrees"] is False:
                    yield float(one.columns["margin"] or 0.0), number, row, one

    chosen = heapq.nsmallest(most, places(), key=lambda place: place[:3])
    wanted = {(number, row): one for _, number, row, one in chosen}
    found: dict[tuple[int, int], Picked] = {}
    for number, source in enumerate(sources):
        last = max((row for n, row in wanted if n == number), default=-1)
        for row, content in zip(range(last + 1), source.rows(), strict=False):
            columns = wanted[number, row].columns if (number, row) in wanted else None
            if columns is not None and not isinstance(content, DataError):
                rest = {name: value for name, value in content.items() if name not in reader.taken}
                found[number, row] = Picked(source.name, row + 1, reader.pair(content), columns, rest)
    return [found[number, row] for _, number, row, _ in chosen if (number, row) in found]


def histogram(values_N: NDArray[np.float32]) -> Iterator[str]:
    """Text bars; the outermost hold what lies beyond them."""
    counts, edges = binned(values_N, BARS)
    for count, left, right in zip(counts, edges, edges[1:], strict=False):
        bar = "█" * round(WIDTH * count / counts.max())
        yield f"{left:9.3g} … {right:9.3g} {'(flipped)' if right <= 0 else '         '} {count:9,} {bar}"


def binned(values_N: NDArray[np.float32], bars: int) -> tuple[Indices, Doubles]:
    """Counts ``[bars]`` and edges ``[bars + 1]``; zero is an edge where it is in the range, so that no bar mixes the
    signs.
    """
    low, high = (float(edge) for edge in np.quantile(values_N, [0.005, 0.995]))
    if low == high:
        low, high = low - 0.5, high + 0.5
    step = (high - low) / (bars - 1)
    first = np.floor(low / step)
    edges = step * np.arange(first, first + bars + 1)
    counts, _ = np.histogram(np.clip(values_N, edges[0], edges[-1]), edges)
    return counts, edges


def shown(one: Picked) -> str:
    """A pair for the terminal."""
    turns = as_turns(one.pair.prompt)
    prompt = turns[0]["content"] if len(turns) == 1 else "\n".join(f"[{m['role']}] {m['content']}" for m in turns)
    columns = one.columns
    probability = columns.get("label_probability")
    told = "" if probability is None else f", label right with probability {probability:.3f}"
    answers = [
        f"  {name:8} ({columns[f'{name}_score']:.3f}): {text}"
        for name, text in (("chosen", one.pair.chosen), ("rejected", one.pair.rejected))
    ]
    heading = f"── {one.source}, row {one.row}: margin {columns['margin']:.3f}{told} "
    return "\n".join([f"{heading:─<100}", prompt, *answers])


def _common(reasons: Counter[str]) -> tuple[tuple[str, int], ...]:
    """The most frequent reasons; those that differ in a count only (of tokens, say) are one, in the first's words."""
    grouped: Counter[str] = Counter()
    first: dict[str, str] = {}
    for reason, rows in reasons.items():
        kind = COUNTED.sub(lambda found: "#" if found[1] else found[0], reason)
        grouped[kind] += rows
        first.setdefault(kind, reason)
    return tuple((first[kind], rows) for kind, rows in grouped.most_common(MOST_REASONS))
