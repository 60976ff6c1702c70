"""What is judged: labelled responses with their states, and what is compared among them.

    M  responses          P  comparisons of a better with a worse response to one prompt
    G  lists (a pair is a list of two)

Pairs, ranking lists and single labelled responses all come down to this, so every reward and every baseline is judged
alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from inward.errors import DataError
from inward.types import Doubles, Floats, Indices, Position

Source = Literal["pairs", "lists", "responses"]


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """M labelled responses in G lists."""

    source: Source
    safe_M: NDArray[np.bool_]
    list_M: Indices
    """Which list (0 to G - 1) a response belongs to."""
    prompt_M: Indices
    """Responses to one prompt have one number: what folds and resamples go by."""
    pairs_P2: Indices
    """Row numbers, the better (safe) response first."""
    layers: tuple[int, ...]
    states_MLD: Floats
    position: Position = "last"
    prompt_states_GLD: Floats | None = None
    length_M: Doubles | None = None
    """Tokens of each response."""
    length_difference_P: Doubles | None = None
    """Tokens of the better response minus tokens of the worse one."""
    text_M: tuple[str, ...] | None = None
    stable_rank_M: Doubles | None = None
    """See ``baselines.stable_rank``."""
    refusals_P2: Indices | None = None
    """Row numbers of (refusal, helpful answer) to one harmless prompt: the refusal should not win."""
    part_M: tuple[str, ...] | None = None
    """What the report is divided by: source, category, whatever column was named."""
    final_norm: bool = False
    """The backbone's last layer was read after its final norm."""

    def __post_init__(self) -> None:
        safe = int(self.safe_M.sum())
        if not 0 < safe < len(self.safe_M):
            which = "safe" if safe else "unsafe"
            raise DataError(
                f"all {len(self.safe_M)} responses are labelled {which}: to judge a reward both kinds are needed"
            )
        if len(np.unique(self.prompt_M)) < 2:
            raise DataError(
                "all responses are to one prompt: at least two different prompts are needed to judge a reward"
            )

    def __len__(self) -> int:
        return len(self.safe_M)

    @property
    def prompts(self) -> int:
        """How many different prompts there are."""
        return len(np.unique(self.prompt_M))

    @property
    def members(self) -> tuple[Indices, ...]:
        """The rows of each list, in order."""
        return _members(self.list_M)

    @property
    def mixed(self) -> tuple[Indices, ...]:
        """Lists with a safe and an unsafe response: the only ones whose top pick says something. None of them for
        pairs.
        """
        if self.source != "lists":
            return ()
        return tuple(rows for rows in self.members if 0 < self.safe_M[rows].sum() < len(rows))

    @property
    def mixed_prompts(self) -> Indices:
        """The prompt of each of them."""
        return np.array([self.prompt_M[rows[0]] for rows in self.mixed], dtype=np.int64)

    @property
    def prompt_P(self) -> Indices:
        """The prompt of each comparison."""
        return self.prompt_M[self.pairs_P2[:, 0]]


def part(examples: Examples, name: str) -> Examples:
    """The responses of one part, whole comparisons only.

    Raises:
        DataError: one class, or one prompt only.
    """
    assert examples.part_M is not None
    inside_M = np.array([one == name for one in examples.part_M])
    rows = np.flatnonzero(inside_M)
    place_M = np.cumsum(inside_M) - 1

    def pairs(pairs_P2: Indices, values: Doubles | None = None) -> tuple[Indices, Doubles | None]:
        kept = inside_M[pairs_P2].all(axis=1)
        return place_M[pairs_P2[kept]], None if values is None else values[kept]

    pairs_P2, difference_P = pairs(examples.pairs_P2, examples.length_difference_P)
    lists, list_M = np.unique(examples.list_M[rows], return_inverse=True)
    prompt_states, refusals = examples.prompt_states_GLD, examples.refusals_P2
    return replace(
        examples,
        safe_M=examples.safe_M[rows],
        list_M=list_M,
        prompt_M=examples.prompt_M[rows],
        pairs_P2=pairs_P2,
        states_MLD=examples.states_MLD[rows],
        prompt_states_GLD=None if prompt_states is None else prompt_states[lists],
        length_M=None if examples.length_M is None else examples.length_M[rows],
        length_difference_P=difference_P,
        text_M=None if examples.text_M is None else tuple(examples.text_M[i] for i in rows),
        stable_rank_M=None if examples.stable_rank_M is None else examples.stable_rank_M[rows],
        refusals_P2=None if refusals is None else pairs(refusals)[0],
        part_M=None,
    )


def of_pairs(
    chosen_NLD: Floats,
    rejected_NLD: Floats,
    *,
    layers: Sequence[int],
    groups: ArrayLike,
    position: Position = "last",
    length_difference: ArrayLike | None = None,
) -> Examples:
    """Preference pairs: the chosen responses are rows 0 to N - 1, the rejected ones follow.

    Raises:
        DataError: there is nothing to compare, or one prompt only.
    """
    n = len(chosen_NLD)
    number_N = np.arange(n)
    return Examples(
        "pairs",
        safe_M=np.arange(2 * n) < n,
        list_M=np.tile(number_N, 2),
        prompt_M=np.tile(np.asarray(groups, dtype=np.int64), 2),
        pairs_P2=np.stack([number_N, number_N + n], axis=1),
        layers=tuple(layers),
        states_MLD=np.concatenate([chosen_NLD, rejected_NLD]),
        position=position,
        length_difference_P=None if length_difference is None else np.asarray(length_difference, dtype=np.float64),
    )


def of_lists(
    candidates_MLD: Floats,
    safe: ArrayLike,
    list_of: ArrayLike,
    groups: ArrayLike,
    *,
    layers: Sequence[int],
    position: Position = "last",
    prompt_states_GLD: Floats | None = None,
    length: ArrayLike | None = None,
    text: Sequence[str] | None = None,
    source: Source = "lists",
) -> Examples:
    """Labelled responses in lists; every safe response of a list is compared with every unsafe one.

    Args:
        safe: ``[M]``.
        list_of: ``[M]``, the list of each response, from 0.
        groups: ``[G]``, one number for lists of the same prompt.

    Raises:
        DataError: one class, or one prompt only.
    """
    safe_M, list_M = np.asarray(safe, dtype=bool), np.asarray(list_of, dtype=np.int64)
    pairs_P2 = comparisons(list_M, safe_M, ~safe_M)
    length_M = None if length is None else np.asarray(length, dtype=np.float64)
    return Examples(
        source,
        safe_M,
        list_M,
        np.asarray(groups, dtype=np.int64)[list_M],
        pairs_P2,
        tuple(layers),
        candidates_MLD,
        position,
        prompt_states_GLD,
        length_M,
        None if length_M is None else length_M[pairs_P2[:, 0]] - length_M[pairs_P2[:, 1]],
        None if text is None else tuple(text),
    )


def comparisons(list_M: Indices, first_M: NDArray[np.bool_], second_M: NDArray[np.bool_]) -> Indices:
    """``[P, 2]``: every pair of a first-class and a second-class row of the same list."""
    pairs = [pair for rows in _members(list_M) for pair in product(rows[first_M[rows]], rows[second_M[rows]])]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _members(list_M: Indices) -> tuple[Indices, ...]:
    order = np.argsort(list_M, kind="stable")
    return tuple(np.split(order, np.cumsum(np.bincount(list_M))[:-1]))
