"""What a summary has to say of its own flags: can the head judge these labels, how many of those that it contradicts
are its own errors, how many are wrong, and where.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from inward.heads.held_out import HeldOut
from inward.offline.annotate.duplicates import Repeated, Seen, hashed, text_of
from inward.offline.annotate.noise import FEWEST_PROMPTS, Noise, agreement, noise
from inward.offline.annotate.scorer import Annotated
from inward.offline.evaluate.responses import part_of
from inward.offline.evaluate.statistics import Estimate, spearman
from inward.types import Doubles, Indices
from inward_client.rows import DataError, PairReader, Row

MOST_PARTS = 20
"""That are told one by one, the largest first."""
MOST_RANKED = 100_000
"""Pairs whose rank correlation is worked out."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Labels of one source or category, or all."""

    name: str
    pairs: int
    contradicted: int
    noise: Noise | None
    """None of too few prompts, or where the head can't judge."""

    def to_json(self) -> dict[str, Any]:
        """With the two estimates, each with its interval."""
        found = self.noise
        return {
            "part": self.name, "pairs": self.pairs, "contradicted": self.contradicted,
            "wrong": found.wrong.to_json() if found else None,
            "confident_learning": found.flagged.to_json() if found else None,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Quality:
    """Of all annotated pairs that are no ties."""

    held_out: HeldOut | None
    agreement: Estimate | None
    whole: Part
    own_errors: float | None
    """Of the contradicted labels, how many are probably the head's errors."""
    by: str | None
    parts: tuple[Part, ...]
    """The largest first."""
    longer: float | None
    """How often the longer answer is the chosen one; equal lengths count one half."""
    length_correlation: float | None
    """Rank correlation of margin and difference of lengths."""
    repeated: Repeated

    @property
    def length_alone(self) -> float | None:
        """How often length agrees with the labels, whichever way it is taken."""
        return None if self.longer is None else max(self.longer, 1 - self.longer)

    @property
    def length_does_as_well(self) -> bool:
        """Whether the head's agreement is not clearly above that of length."""
        return self.agreement is not None and self.length_alone is not None and self.agreement.low <= self.length_alone

    def to_json(self) -> dict[str, Any]:
        """For ``--json`` and the metadata."""
        held = self.held_out
        return {
            "held_out": held and {"agreement": held.agreement, "pairs": held.pairs, "interval": list(held.interval)},
            "agreement": self.agreement.to_json() if self.agreement else None,
            **{name: value for name, value in self.whole.to_json().items() if name != "part"},
            "own_errors": self.own_errors,
            "length": {
                "agreement": self.length_alone, "better": _better(self.longer),
                "rank_correlation": self.length_correlation, "does_as_well": self.length_does_as_well,
            },
            "by": self.by,
            "parts": [part.to_json() for part in self.parts],
            "repeated": self.repeated.to_json(),
        }  # fmt: skip

    def text(self) -> Iterator[str]:
        """Lines for the terminal."""
        yield from self._can_it_judge()
        yield from self._how_many()
        if self.parts:
            width = max(len(self.by or ""), *(len(part.name) for part in self.parts[:MOST_PARTS]))
            yield f"  {self.by or '':{width}}    pairs  contradicted  wrong, estimated"
            for part in self.parts[:MOST_PARTS]:
                told = percent(part.noise.wrong) if part.noise else "too few prompts, or the head can't judge these"
                yield f"  {part.name:{width}} {part.pairs:8,} {part.contradicted / part.pairs:13.1%}  {told}"
            if len(self.parts) > MOST_PARTS:
                yield f"  and {len(self.parts) - MOST_PARTS} smaller ones"
        if self.length_does_as_well and self.agreement and self.length_alone is not None:
            yield (
                f"  warning: the {_better(self.longer)} answer alone agrees with {self.length_alone:.1%} of the "
                f"labels, the head with {percent(self.agreement)}: it is not shown to know more than length"
            )
        yield from self._repeats()

    def _can_it_judge(self) -> Iterator[str]:
        pairs, held = self.whole.pairs, self.held_out
        if held is None:
            yield "  how often the head agrees with held-out labels is not known: its manifest does not say"
        else:
            low, high = held.interval
            yield (
                f"  on held-out labels the head agreed with {held.agreement:.1%} [{low:.1%}, {high:.1%}] of "
                f"{held.pairs:,} pairs: were every label here right, it would contradict about "
                f"{(1 - held.agreement) * pairs:,.0f}"
            )

    def _how_many(self) -> Iterator[str]:
        found = self.whole.noise
        if self.held_out is not None and not self.held_out.better_than_chance:
            yield "  that is not shown to be better than chance: how many labels are wrong is not estimated"
            return
        if found is None:
            yield (
                "  how many labels are wrong can't be estimated: there are fewer than "
                f"{FEWEST_PROMPTS} prompts, or the head contradicts most labels, so it can't judge these"
            )
            return
        if self.own_errors is not None:
            yield f"  of the contradicted labels about {self.own_errors:,.0f} are probably the head's own errors"
        share, pairs = found.wrong, self.whole.pairs
        yield (
            f"  wrong labels, estimated: {percent(share)}, that is about {share.value * pairs:,.0f} (between "
            f"{share.low * pairs:,.0f} and {share.high * pairs:,.0f}); confident learning would flag "
            f"{percent(found.flagged)}, the head's errors among them"
        )

    def _repeats(self) -> Iterator[str]:
        told = self.repeated
        if told.exact or told.near:
            yield f"  {told.exact:,} rows repeat an earlier one, {told.near:,} more but for a few words"
        if told.both_ways:
            yield f"  {told.both_ways:,} rows are there with the other label, too"
        if told.contradictory:
            yield f"  {told.contradictory:,} answers are preferred in one row and rejected in another"


class Survey:
    """One pass over the annotated rows: what the estimates need of each, some dozens of bytes.

    Args:
        by: a column of the input that divides the estimates.
    """

    def __init__(self, reader: PairReader, by: str | None) -> None:
        self._reader, self._by, self._seen = reader, by, Seen()
        self._names: dict[str, int] = {}
        self._margins, self._lengths, self._parts, self._prompts = array("f"), array("f"), array("i"), array("q")

    def add(self, rows: Iterable[tuple[Row, Annotated]]) -> None:
        """Takes rows that were annotated."""
        for row, annotated in rows:
            assert annotated.columns is not None
            try:
                pair = self._reader.pair(row)
            except DataError:  # the file was changed meanwhile
                continue
            self._seen.add(pair)
            if annotated.columns["label_agrees"] is None:
                continue
            name = None if self._by is None else part_of(row, self._by) or "none"
            part = -1 if name is None else self._names.setdefault(name, len(self._names))
            self._margins.append(annotated.columns["margin"] or 0.0)
            self._lengths.append(len(pair.chosen) - len(pair.rejected))
            self._parts.append(part)
            self._prompts.append(hashed(text_of(pair.prompt)))

    def quality(self, held_out: HeldOut | None) -> Quality:
        """What was found."""
        margin_N, length_N = (np.array(one, dtype=np.float64) for one in (self._margins, self._lengths))
        part_N, group_N = np.array(self._parts, dtype=np.int64), np.array(self._prompts, dtype=np.int64)
        judges = held_out is None or held_out.better_than_chance
        whole = _part("all", margin_N, group_N, judges)
        parts = [_part(name, margin_N[own], group_N[own], judges) for name, own in self._rows(part_N)]
        against_N = margin_N[margin_N < 0]
        return Quality(
            held_out,
            agreement(margin_N, group_N) if len(margin_N) else None,
            whole,
            float((1 - whole.noise.posterior(against_N)).sum()) if whole.noise else None,
            self._by,
            tuple(sorted(parts, key=lambda part: -part.pairs)),
            float(np.where(length_N, length_N > 0, 0.5).mean()) if length_N.any() else None,
            _correlation(margin_N, length_N),
            self._seen.repeated(),
        )

    def _rows(self, part_N: Indices) -> Iterator[tuple[str, Indices]]:
        """Of each part its rows; however many parts there are, they are sorted once."""
        order_N = np.argsort(part_N, kind="stable")
        ends = np.searchsorted(part_N[order_N], np.arange(len(self._names) + 1))
        for name, (first, end) in zip(self._names, pairwise(ends), strict=True):
            yield name, order_N[first:end]


def percent(estimate: Estimate) -> str:
    """With its interval, in percent."""
    return f"{estimate.value:.1%} [{estimate.low:.1%}, {estimate.high:.1%}]"


def _part(name: str, margin_N: Doubles, group_N: Indices, judges: bool) -> Part:
    found = noise(margin_N, group_N) if judges and len(margin_N) else None
    return Part(name, len(margin_N), int((margin_N < 0).sum()), found)


def _better(longer: float | None) -> str | None:
    return None if longer is None else "longer" if longer >= 0.5 else "shorter"


def _correlation(margin_N: Doubles, length_N: Doubles) -> float | None:
    some: Sequence[Doubles] = (margin_N[:MOST_RANKED], length_N[:MOST_RANKED])
    if len(margin_N) < 2:
        return None
    value = float(spearman(*some)(np.ones((1, len(some[0]))))[0])
    return value if math.isfinite(value) else None
