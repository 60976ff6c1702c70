"""Same states, same seed, same head: bit for bit, on the same machine.

Small fits run on one thread, so that it does not matter how many there are: they would gain little. Large ones use the
CPUs that the process may run on, and are the same again where there are as many.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from inward.backbones.cpus import available_cpus

LARGE = 2 * 10**7
"""Numbers in the states from which on a fit is large: 1,500 pairs on 30 layers of 576 have 26 million."""


@contextmanager
def reproducible(seed: int, *, large: bool = False) -> Iterator[None]:
    """Few threads, torch seeded, the caller's state kept.

    Only libraries that are loaded by then are limited: import numpy's and scipy's users at the top of their files.
    """
    before = torch.get_num_threads()
    threads = min(before, available_cpus()) if large else 1
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]), threadpool_limits(threads):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)
