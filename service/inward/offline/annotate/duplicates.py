"""Pairs that are there more than once: the same, nearly the same, the other way round, or with an answer that is
preferred in one row and rejected in another.

What is kept of a pair are hashes and a sketch of its words (MinHash, Broder 1997, of 16 bits each as in Li and König
2010): 56 bytes a row.
"""

from __future__ import annotations

import json
import re
import zlib
from array import array
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from inward_client.rows import Pair, Prompt

HASHES = 16
"""Of a sketch."""
ALIKE = 14
"""Equal hashes of a sketch by which two rows are nearly the same: about 0.9 of their words in the same order."""
WORD = re.compile(r"\w+")
_MULTIPLIERS = np.random.default_rng(0).integers(1, 2**31, size=HASHES, dtype=np.uint64) * 2 + 1
_BLOCK = 65_536
"""Rows that are compared at once."""


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
        self._keys = array("q")  # of each row the hash of its pair and label, and those of its two answers
        self._sketches = bytearray()

    def add(self, pair: Pair) -> None:
        """Remembers a pair."""
        prompt = text_of(pair.prompt)
        first, second = sorted((pair.chosen, pair.rejected))
        either = hashed(prompt, first, second) & ~1  # the pair, whichever way round
        label = int(pair.chosen != first)
        self._keys.extend((either | label, hashed(prompt, pair.chosen), hashed(prompt, pair.rejected)))
        self._sketches += sketch(prompt, pair.chosen, pair.rejected).tobytes()

    def repeated(self) -> Repeated:
        """What is there more than once."""
        if not self._keys:
            return Repeated()
        pair_N, chosen_N, rejected_N = np.frombuffer(self._keys, dtype=np.int64).reshape(-1, 3).T
        sketch_NH = np.frombuffer(self._sketches, dtype=np.uint16).reshape(-1, HASHES)
        _, first = np.unique(pair_N, return_index=True)
        single_N = np.zeros(len(pair_N), dtype=bool)
        single_N[first] = True
        no_tie_N = chosen_N != rejected_N
        return Repeated(
            exact=int((~single_N).sum()),
            near=_near(sketch_NH[single_N]),
            both_ways=int((np.isin(pair_N, pair_N ^ 1) & no_tie_N).sum()),
            contradictory=len(np.intersect1d(chosen_N[no_tie_N], rejected_N[no_tie_N])),
        )


def hashed(*texts: str) -> int:
    """63 bits of the texts."""
    content = json.dumps(texts).encode()
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "big") >> 1


def text_of(prompt: Prompt) -> str:
    """A prompt as one text, whether it is a text or messages."""
    return prompt if isinstance(prompt, str) else json.dumps([dict(turn) for turn in prompt], sort_keys=True)


def sketch(prompt: str, chosen: str, rejected: str) -> NDArray[np.uint16]:
    """``[16]``: the lower half of the smallest of each hash over runs of two words, of which each knows where it
    stands.
    """
    words = [
        f"{where}{one}"
        for where, text in (("p", prompt), ("c", chosen), ("r", rejected))
        for one in WORD.findall(text.lower())
    ]
    runs = {zlib.crc32(f"{a} {b}".encode("utf-8", "replace")) for a, b in pairwise(["", *words, ""])}
    base_R = np.fromiter(runs, dtype=np.uint64, count=len(runs))
    mixed_HR = (base_R[None] * _MULTIPLIERS[:, None]) >> np.uint64(16)
    return np.asarray((mixed_HR & np.uint64(0xFFFFFFFF)).min(axis=1) & np.uint64(0xFFFF), dtype=np.uint16)


def _near(sketch_NH: NDArray[np.uint16]) -> int:
    """Rows whose sketch is nearly that of an earlier one."""
    near_N = np.zeros(len(sketch_NH), dtype=bool)
    place_N = np.arange(len(sketch_NH))
    for band_N in np.ascontiguousarray(sketch_NH).view(np.uint64).T:  # of four hashes each
        _, first, member_N = np.unique(band_N, return_index=True, return_inverse=True)
        earlier_N = first[member_N]
        for some in np.array_split(place_N[earlier_N < place_N], 1 + len(place_N) // _BLOCK):
            near_N[some] |= (sketch_NH[some] == sketch_NH[earlier_N[some]]).sum(axis=1) >= ALIKE
    return int(near_N.sum())
