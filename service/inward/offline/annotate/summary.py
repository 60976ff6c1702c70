"""What an annotated dataset looks like: how many labels look flipped, how the margins are spread, which pairs to
look at first.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inward.offline.annotate.quality import Quality
from inward.offline.annotate.scorer import Annotated, Columns
from inward_client.rows import DataError, Pair, PairReader, Source, as_turns

BARS = 15
WIDTH = 44
"""Characters of the longest bar."""
MOST_REASONS = 5
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
class Suspicious:
    """A pair whose margin contradicts its label."""

    source: str
    row: int
    """Of its source, from 1."""
    pair: Pair
    columns: Columns


def summarise(results: Iterable[Annotated]) -> Summary:
    """One pass over what became of all rows."""
    rows = truncated = flipped = ties = sure = 0
    total = 0.0
    margins: list[NDArray[np.float32]] = []
    held: list[float] = []
    reasons: Counter[str] = Counter()
    for one in results:
        rows += 1
        if one.columns is None:
            reasons[one.error or "unknown"] += 1
            continue
        truncated += one.truncated
        flipped += one.columns["label_agrees"] is False
        ties += one.columns["label_agrees"] is None
        held.append(float(one.columns["margin"] or 0.0))
        if (confidence := one.columns["confidence"]) is not None:
            sure, total = sure + 1, total + confidence
        if len(held) == 65_536:
            margins.append(np.array(held, dtype=np.float32))
            held = []
    margin_N = np.concatenate([*margins, np.array(held, dtype=np.float32)])
    confidence = total / sure if sure else None
    return Summary(rows, len(margin_N), truncated, flipped, ties, margin_N, confidence, _common(reasons))


def suspicious(
    sources: Sequence[Source], results: Mapping[str, Iterable[Annotated]], reader: PairReader, most: int
) -> list[Suspicious]:
    """The ``most`` pairs whose margins contradict their labels most, smallest margin first."""

    def places() -> Iterator[tuple[float, int, int, Columns]]:
        for number, source in enumerate(sources):
            for row, one in enumerate(results[source.name]):
                if one.columns is not None and one.columns["label_agrees"] is False:
                    yield float(one.columns["margin"] or 0.0), number, row, one.columns

    chosen = heapq.nsmallest(most, places(), key=lambda place: place[:3])
    wanted = {(number, row): columns for _, number, row, columns in chosen}
    found: dict[tuple[int, int], Suspicious] = {}
    for number, source in enumerate(sources):
        last = max((row for n, row in wanted if n == number), default=-1)
        for row, content in zip(range(last + 1), source.rows(), strict=False):
            if (number, row) in wanted and not isinstance(content, DataError):
                found[number, row] = Suspicious(source.name, row + 1, reader.pair(content), wanted[number, row])
    return [found[number, row] for _, number, row, _ in chosen if (number, row) in found]


def histogram(values_N: NDArray[np.float32]) -> Iterator[str]:
    """Text bars; the outermost hold what lies beyond them."""
    counts, edges = binned(values_N, BARS)
    for count, left, right in zip(counts, edges, edges[1:], strict=False):
        bar = "█" * round(WIDTH * count / counts.max())
        yield f"{left:9.3g} … {right:9.3g} {'(flipped)' if right <= 0 else '         '} {count:9,} {bar}"


def binned(values_N: NDArray[np.float32], bars: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
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


def shown(one: Suspicious) -> str:
    """A suspicious pair for the terminal."""
    turns = as_turns(one.pair.prompt)
    prompt = turns[0]["content"] if len(turns) == 1 else "\n".join(f"[{m['role']}] {m['content']}" for m in turns)
    columns = one.columns
    confidence = "" if columns["confidence"] is None else f", confidence {columns['confidence']:.3f}"
    answers = [
        f"  {name:8} ({columns[f'{name}_score']:.3f}): {text}"
        for name, text in (("chosen", one.pair.chosen), ("rejected", one.pair.rejected))
    ]
    heading = f"── {one.source}, row {one.row}: margin {columns['margin']:.3f}{confidence} "
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
