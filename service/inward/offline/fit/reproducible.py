"""Same states, same seed, same head: bit for bit, however many threads there are.

The pass through the model that gives the states keeps its threads, since it takes nearly all of the time: its sums, and
so the last bits of the states, are the same on the same machine with the same number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """One thread, so that sums have one order (fits are too small to gain much from more), torch seeded, the caller's
    state kept.

    Only libraries that are loaded by then are limited: import numpy's and scipy's users at the top of their files.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), threadpool_limits(1):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)
