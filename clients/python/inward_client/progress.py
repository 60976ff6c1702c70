"""A progress bar, where one is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(shown: bool, total: int, what: str) -> Iterator[Callable[[int], object]]:
    """A bar of ``total`` elements; what it gives is called with how many more are done.

    Raises:
        ImportError: it is to be shown and tqdm is not installed.
    """
    if not shown:
        yield lambda done: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("progress=True needs tqdm: pip install 'inward-client[progress]'") from None
    with tqdm(total=total, unit=what, smoothing=0.1) as meter:
        yield meter.update
