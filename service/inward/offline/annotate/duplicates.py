"""Pairs that are there more than once: the same, nearly the same, the other way round, or with an answer that is
preferred in one row and rejected in another.

What is kept of a pair are hashes and a sketch of its words (MinHash, Broder 1997): about a hundred bytes a row.
"""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from inward_client.rows import Pair, Prompt

HASHES = 16
"""Of a sketch."""
BANDS = 4
"""Of the sketch; rows that share one are compared."""
ALIKE = 14
"""Equal hashes of a sketch by which two rows are nearly the same: about 0.9 of their words in the same order."""
WORD = re.compile(r"\w+")
_MULTIPLIERS = np.random.default_rng(0).integers(1, 2**31, size=HASHES, dtype=np.uint64) * 2 + 1
_BLOCK = 65_536


@dataclass(frozen=True, slots=True)
class Repeated:
    """Rows that are there more than once."""

    exact: int = 0
    """Rows that repeat an earlier one word for word."""
    near: int = 0
    """Rows that repeat an earlier one but for a few words."""
    both_ways: int = 0
    """Rows whose pair is there with the other label, too: one of the two must be wrong."""
    contradictory: int = 0
    """Answers to a prompt that are preferred in one row and rejected in another."""

    def to_json(self) -> dict[str, int]:
        """By name."""
        return asdict(self)


class Seen:
    """All pairs so far."""

    def __init__(self) -> None:
        self._keys: list[tuple[int, int, int, int]] = []
        self._sketches: list[NDArray[np.uint32]] = []
        self._key_blocks: list[NDArray[np.int64]] = []
        self._sketch_blocks: list[NDArray[np.uint32]] = []

    def add(self, pair: Pair) -> None:
        """Remembers a pair."""
        prompt = text_of(pair.prompt)
        chosen, rejected = hashed(prompt, pair.chosen), hashed(prompt, pair.rejected)
        both = hashed(prompt, pair.chosen, pair.rejected), hashed(prompt, pair.rejected, pair.chosen)
        self._keys.append((*both, chosen, rejected))
        self._sketches.append(sketch(prompt, pair.chosen, pair.rejected))
        if len(self._keys) == _BLOCK:
            self._pack()

    def repeated(self) -> Repeated:
        """What is there more than once."""
        self._pack()
        if not self._key_blocks:
            return Repeated()
        keys_N4, sketch_NH = np.concatenate(self._key_blocks), np.concatenate(self._sketch_blocks)
        pair_N, turned_N, chosen_N, rejected_N = keys_N4.T
        _, first = np.unique(pair_N, return_index=True)
        single_N = np.zeros(len(pair_N), dtype=bool)
        single_N[first] = True
        no_tie_N = pair_N != turned_N
        return Repeated(
            exact=int((~single_N).sum()),
            near=_near(sketch_NH[single_N]),
            both_ways=int((np.isin(pair_N, turned_N) & no_tie_N).sum()),
            contradictory=len(np.intersect1d(chosen_N[no_tie_N], rejected_N[no_tie_N])),
        )

    def _pack(self) -> None:
        if self._keys:
            self._key_blocks.append(np.array(self._keys, dtype=np.int64))
            self._sketch_blocks.append(np.array(self._sketches, dtype=np.uint32))
            self._keys, self._sketches = [], []


def hashed(*texts: str) -> int:
    """63 bits of the texts."""
    content = json.dumps(texts).encode()
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "big") >> 1


def text_of(prompt: Prompt) -> str:
    """A prompt as one text, whether it is a text or messages."""
    return prompt if isinstance(prompt, str) else json.dumps([dict(turn) for turn in prompt], sort_keys=True)


def sketch(prompt: str, chosen: str, rejected: str) -> NDArray[np.uint32]:
    """``[16]``: the smallest of each hash over runs of two words, of which each knows where it stands."""
    words = [
        f"{where}{one}"
        for where, text in (("p", prompt), ("c", chosen), ("r", rejected))
        for one in WORD.findall(text.lower())
    ]
    runs = {zlib.crc32(f"{a} {b}".encode("utf-8", "replace")) for a, b in pairwise(["", *words, ""])}
    base_R = np.fromiter(runs, dtype=np.uint64, count=len(runs))
    mixed_HR = (base_R[None] * _MULTIPLIERS[:, None]) >> np.uint64(16)
    return np.asarray((mixed_HR & np.uint64(0xFFFFFFFF)).min(axis=1), dtype=np.uint32)


def _near(sketch_NH: NDArray[np.uint32]) -> int:
    """Rows whose sketch is nearly that of an earlier one."""
    near_N = np.zeros(len(sketch_NH), dtype=bool)
    for band_NB in np.split(sketch_NH, BANDS, axis=1):
        _, first, member_N = np.unique(band_NB, axis=0, return_index=True, return_inverse=True)
        earlier_N = first[member_N.reshape(-1)]
        equal_N = (sketch_NH == sketch_NH[earlier_N]).sum(axis=1)
        near_N |= (equal_N >= ALIKE) & (earlier_N < np.arange(len(sketch_NH)))
    return int(near_N.sum())
