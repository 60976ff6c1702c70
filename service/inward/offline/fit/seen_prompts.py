"""Which prompts a head was fitted on: a Bloom filter of their hashes, which its manifest keeps instead of texts, and
how many of other prompts are among them.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inward.errors import DataError
from inward.heads.base import Manifest
from inward.types import Indices

BITS = 10
"""Of a prompt: 0.8 % of other prompts are taken for one that was seen."""
MOST_BYTES = 192 * 1024
"""Of a filter, 256 KiB as base64: enough for 157,000 prompts; of more it knows less."""
LEAST_BITS = 1024
SUBSTANTIAL = 0.05
"""Share of seen prompts from which figures say nothing about others."""


@dataclass(frozen=True, slots=True)
class Seen:
    """How many of some prompts were in a fit."""

    prompts: int
    of: int
    by_chance: float
    """Prompts that a filter takes for seen ones though they are not, as is to be expected."""

    @property
    def clear(self) -> bool:
        """Whether these are more than there are by chance."""
        return self.prompts > max(1.0, self.by_chance + 3 * math.sqrt(self.by_chance))

    @property
    def substantial(self) -> bool:
        """Whether they are too many for figures to say anything about other texts."""
        return self.clear and self.prompts - self.by_chance >= SUBSTANTIAL * self.of

    def __str__(self) -> str:
        return f"{self.prompts:,} of {self.of:,} prompts were in the fit"


def dump(groups_N: Indices) -> dict[str, Any]:
    """``Manifest.fit["prompts"]``: how many different ones there are, and their filter.

    Args:
        groups_N: of every row, see ``prompt_groups``. Rows of somebody else's states may have numbers that name no
            prompt, and get no filter.
    """
    groups_P = np.unique(groups_N)
    if not _hashes(groups_P):
        return {"count": len(groups_P)}
    bits = 8 * min(MOST_BYTES, -(-max(LEAST_BITS, BITS * len(groups_P)) // 8))
    hashes = min(7, max(1, round(math.log(2) * bits / max(1, len(groups_P)))))
    filter_B = np.zeros(bits, dtype=np.bool_)
    filter_B[_places(groups_P, bits, hashes)] = True
    packed = base64.b64encode(np.packbits(filter_B).tobytes()).decode()
    return {"count": len(groups_P), "hashes": hashes, "filter": packed}


def seen(manifest: Manifest, groups_N: Indices) -> Seen | None:
    """How many of these prompts a head, or one of its parts, was fitted on; None where its manifest does not say, or
    the numbers name no prompts.

    Raises:
        DataError: what it says is damaged.
    """
    groups_P = np.unique(groups_N)
    found_P, new = np.zeros(len(groups_P), dtype=np.bool_), 1.0
    filters = [one for one in _kept(manifest) if one.get("filter")] if _hashes(groups_P) else []
    for one in filters:
        try:
            filter_B = np.unpackbits(np.frombuffer(base64.b64decode(one["filter"]), dtype=np.uint8)).astype(np.bool_)
            found_P |= filter_B[_places(groups_P, len(filter_B), int(one["hashes"]))].all(axis=1)
            new *= 1 - float(filter_B.mean()) ** int(one["hashes"])
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise DataError(
                f"head {manifest.name!r}: what its manifest says of the prompts of its fit is damaged"
            ) from error
    return Seen(int(found_P.sum()), len(groups_P), len(groups_P) * (1 - new)) if filters else None


def _hashes(groups_P: Indices) -> bool:
    """Whether the numbers are those of ``prompt_groups``, of 63 bits, and not somebody's 0, 1, 2, …"""
    return len(groups_P) > 0 and float(np.median(groups_P)) > 2**40


def _kept(manifest: Manifest) -> Iterator[Mapping[str, Any]]:
    """What the manifests of the head and of its parts say."""
    parts: Sequence[Mapping[str, Any]] = manifest.options.get("parts", ())
    for fit in (manifest.fit, *(part["manifest"].get("fit", {}) for part in parts)):
        if isinstance(kept := fit.get("prompts"), Mapping):
            yield kept


def _places(groups_P: Indices, bits: int, hashes: int) -> NDArray[np.int64]:
    """``[P, hashes]``: a prompt's bits, by double hashing (Kirsch and Mitzenmacher, ESA 2006)."""
    mixed_P = groups_P.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    low_P, high_P = ((mixed_P >> np.uint64(shift) & np.uint64(0xFFFFFFFF)).astype(np.int64) for shift in (0, 32))
    return (low_P[:, None] + (high_P | 1)[:, None] * np.arange(hashes)) % bits
