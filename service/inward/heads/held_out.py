"""How good a head is known to be: what its manifest says of labels that it was not fitted on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Z = 1.959964
"""Standard errors of a 95 % interval."""
KEPT_AS = (("held_out", "held_out_rows"), ("accuracy", "judged"), ("accuracy", "pairs"))
"""Names of the agreement and of the number of pairs in a manifest's metrics: of LEGEND, and of the trained heads, whose
figures are cross-validated."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """How often a head agrees with labels that it was not fitted on, as its manifest says."""

    agreement: float
    pairs: int

    @classmethod
    def of(cls, fit: Mapping[str, Any]) -> HeldOut | None:
        """From a manifest's ``fit``; None where it does not say."""
        metrics = fit.get("metrics") or {}
        for share, count in KEPT_AS:
            agreement, pairs = metrics.get(share), metrics.get(count)
            if isinstance(agreement, int | float) and isinstance(pairs, int) and pairs > 0:
                return cls(float(agreement), pairs)
        return None

    @property
    def better_than_chance(self) -> bool:
        """Whether the head is shown to judge at all."""
        return self.interval[0] > 0.5

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, Wilson's."""
        n, p = self.pairs, self.agreement
        centre, wide = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
        return (centre - wide) / (1 + Z * Z / n), (centre + wide) / (1 + Z * Z / n)
