"""What several processes of one run agree on."""

from __future__ import annotations

from typing import Any

from accelerate.utils import broadcast_object_list


def agreed(value: Any, processes: int) -> Any:
    """The main process's value, in all of them."""
    found = [value]
    if processes > 1:
        broadcast_object_list(found, from_process=0)
    return found[0]
