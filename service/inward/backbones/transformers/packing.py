"""Groups laid end to end: each prompt once, its responses after it, no padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from inward.backbones.readout import NOWHERE, Span
from inward.types import Group, Ids


@dataclass(frozen=True, slots=True)
class Segment:
    """The rows of one group: its prompt's, and each response's with its EOS, directly after it."""

    prompt: range
    responses: tuple[range, ...]

    @property
    def rows(self) -> range:
        return range(self.prompt.start, self.responses[-1].stop if self.responses else self.prompt.stop)


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A batch on one token axis of length T."""

    ids_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]
    """Position in its own text: a response counts on from its prompt."""
    segments: tuple[Segment, ...]
    spans: tuple[tuple[Span, ...], ...]
    """Of each group, where its responses are read."""


def pack(groups: Sequence[Group], eos_id: int | None = None) -> Packed:
    """Lays ``groups`` end to end; with ``eos_id`` an EOS follows every response."""
    end = () if eos_id is None else (eos_id,)
    ids: list[int] = []
    positions: list[int] = []
    segments, spans = [], []
    for group in groups:
        P, first = len(group.prompt_ids), len(ids)
        ids += group.prompt_ids
        positions += range(P)
        rows, own = [], []
        for response in group.responses_ids:
            start = len(ids)
            ids += response + end
            positions += range(P, P + len(response) + len(end))
            rows.append(range(start, len(ids)))
            stop = start + len(response)
            own.append(Span(first + P - 1 if P else NOWHERE, range(start, stop), stop if end else NOWHERE))
        segments.append(Segment(range(first, first + P), tuple(rows)))
        spans.append(tuple(own))
    return Packed(np.array(ids, dtype=np.int64), np.array(positions, dtype=np.int64), tuple(segments), tuple(spans))


def cost(group: Group, eos_id: int | None = None) -> int:
    """Rows that ``group`` takes when packed."""
    return len(group.prompt_ids) + sum(len(ids) + (eos_id is not None) for ids in group.responses_ids)


def rectangles(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Batches of texts of similar length, longest first, whose padded size stays within ``budget``; a single larger
    text goes alone.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@dataclass(frozen=True, slots=True, eq=False)
class Padded:
    """A batch of whole texts, one a row, padded on the right to the longest: the plain way, for models that cannot
    be packed.
    """

    ids_BT: NDArray[np.int64]
    mask_BT: NDArray[np.int64]
    spans: tuple[Span, ...]
    """Of each text, rows of the flat axis ``[B * T]``."""


def pad(texts: Sequence[tuple[Ids, Ids]], eos_id: int | None = None) -> Padded:
    """Pads pairs of prompt and response; with ``eos_id`` an EOS follows every response."""
    end = () if eos_id is None else (eos_id,)
    T = max(len(prompt) + len(response) + len(end) for prompt, response in texts)
    ids = np.zeros((len(texts), T), dtype=np.int64)
    mask = np.zeros_like(ids)
    spans = []
    for row, (prompt, response) in enumerate(texts):
        text = prompt + response + end
        ids[row, : len(text)] = text
        mask[row, : len(text)] = 1
        start = row * T + len(prompt)
        stop = start + len(response)
        spans.append(Span(start - 1 if prompt else NOWHERE, range(start, stop), stop if end else NOWHERE))
    return Padded(ids, mask, tuple(spans))
