"""What our process and vLLM's say to each other: names, sizes and messages. Needs neither torch nor vLLM."""

from __future__ import annotations

from typing import Any, NamedTuple

OWNER = "INWARD_VLLM_OWNER"
"""Environment variable that tells ``worker`` the id of the process that opened the engine."""
WORKER = "inward.backbones.vllm.worker.ReadingWorker"
"""The class that vLLM makes in its own process."""
EXTRA_ARG = "inward"
"""Key of ``SamplingParams.extra_args`` under which a request carries its ``Wish``."""
READING = {"inward": 1}
"""Part of vLLM's configuration, so that a graph which was compiled without reading is not taken from its cache. Counts
up when ``reading`` changes what it inserts."""

TABLE_COLUMNS = 384
"""Numbers that are kept for every cached token. What needs more (whole states) is read into rows of its own."""
PLACE_COLUMNS = 144
"""Most of them that one place contributes: its product has this size from the start, whatever heads come and go."""

INSTALL, INSTALL_WIDE = "inward_install", "inward_install_wide"
TAKE, PEEK, NORM, HELD = "inward_take", "inward_peek", "inward_norm", "inward_held"
"""Methods of ``WORKER``, called between two steps."""


class Wish(NamedTuple):
    """What is gathered when a request ends: the rows of its tokens from ``start`` on, under ``key``."""

    key: str
    wide: int
    """Number of the wide layout that it reads; 0 reads the table."""
    start: int


class TableColumns(NamedTuple):
    """New weights of one place, and the columns that they take: in the product of the place, and in the table."""

    place: int
    """Layer, or one more than the last for what comes after the final norm."""
    at: list[int]
    columns: list[int]
    weight: bytes
    """float32 ``[D, K]``; ``bias`` is float32 ``[K]``."""
    bias: bytes


class WidePart(NamedTuple):
    """What one place contributes to a wide row: columns ``start`` to ``stop``, the state itself first if ``state``."""

    place: int
    start: int
    stop: int
    state: bool
    weight: bytes
    bias: bytes


def plain(messages: list[Any]) -> list[Any]:
    """Messages as lists, which is how they cross."""
    return [list(message) for message in messages]
