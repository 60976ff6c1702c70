"""Means with what they may be off."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev


def estimates(group: str, values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """``<group>/<name>``, the mean, and ``<group>/<name>_se``, its standard error; neither where there are no values,
    and no error of a single one.
    """
    found: dict[str, float] = {}
    for name, some in values.items():
        if some:
            found[f"{group}/{name}"] = fmean(some)
        if len(some) > 1:
            found[f"{group}/{name}_se"] = stdev(some) / math.sqrt(len(some))
    return found
