"""A value head, and what it was calibrated to: how much of best-of-N early rejection by it costs, on responses that
were drawn to their end.

A response that lies by more than ``z`` standard deviations below the best one at a decision point is rejected, where
the deviation is that of the finished rewards about what the head predicts there. So one number says how bold all points
are, and a table says what each costs: the share of best-of-N's gain over a single response that was lost, as mean over
prompts and as the upper end of its interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from inward.errors import HeadError, InvalidField
from inward.heads.base import Head, Manifest
from inward.heads.ensemble import EnsembleHead
from inward.heads.legend import LegendHead
from inward.types import Floats

KEY = "rejection"
OF, OF_VERSION, OF_CREATED = "of", "of_version", "of_created"
"""Keys of ``Manifest.options`` under which a value head says which head's reward it predicts: its name, its version,
and when it was fitted, which online updates leave as it is. Where there is only the name, that decides."""


class ValueHead:
    """Reads a direction alone, or a direction beside the head whose reward it predicts."""

    @staticmethod
    def from_tensors(manifest: Manifest, tensors: Mapping[str, Floats]) -> Head:
        """A ``LegendHead`` of one direction, or an ``EnsembleHead`` of the two.

        Raises:
            HeadError: tensors of neither.
        """
        kind = LegendHead if "direction" in tensors else EnsembleHead
        return kind.from_tensors(manifest, tensors)


def options_for(of: Manifest) -> dict[str, Any]:
    """What a value head for the head ``of`` says of it in its options."""
    return {OF: of.name, OF_VERSION: of.version, OF_CREATED: of.created}


def predicts(value: Manifest, of: Manifest) -> bool:
    """Whether a value head was fitted for this head, be it before online updates of it, and for none that was fitted
    anew since.
    """
    return value.options.get(OF) == of.name and value.options.get(OF_CREATED, of.created) == of.created


def calibrated_for(value: Manifest, of: Manifest) -> bool:
    """Whether the calibration of a value head is of this version of this head, whatever it is called."""
    if OF_VERSION not in value.options:
        return True
    return (value.options[OF_VERSION], value.options.get(OF_CREATED)) == (of.version, of.created)


def check_calibrated_for(value: Manifest, of: Manifest) -> None:
    """That what a value head promises holds where the head ``of`` ranks.

    Raises:
        InvalidField: it does not.
    """
    if not calibrated_for(value, of):
        told = value.options
        raise InvalidField(
            f"head {value.name!r} is calibrated for version {told[OF_VERSION]} of head {told.get(OF)!r}, fitted "
            f"{told.get(OF_CREATED)}, but version {of.version} of {of.name!r}, fitted {of.created}, ranks: fit the "
            f"value head again for version {of.version} (inward fit value), or give early_rejection.keep and at",
            param="early_rejection.max_loss",
        )


@dataclass(frozen=True, slots=True)
class Boldness:
    """One row of the table: what rejecting at ``z`` costs and saves."""

    z: float
    loss: float
    upper: float
    """End of the 95 % interval of ``loss`` over prompts."""
    drawn: float
    """Share of the tokens that were drawn."""


@dataclass(frozen=True, slots=True)
class RejectionCurve:
    """Manifest's ``calibration["rejection"]``."""

    at: tuple[int, ...]
    deviations: tuple[float, ...]
    """Of the finished reward about the prediction, at each of ``at``, within a prompt."""
    n: int
    """Responses a prompt in the runs."""
    table: tuple[Boldness, ...]
    """By ascending ``z``."""

    @classmethod
    def load(cls, calibration: Mapping[str, Any]) -> Self | None:
        """Out of a manifest's ``calibration``; None where there is none.

        Raises:
            HeadError: an entry that can't be used.
        """
        entry = calibration.get(KEY)
        if entry is None:
            return None
        try:
            table = tuple(Boldness(**{name: float(value) for name, value in row.items()}) for row in entry["table"])
            at = tuple(int(point) for point in entry["at"])
            deviations = tuple(float(deviation) for deviation in entry["deviations"])
            curve = cls(at, deviations, int(entry["n"]), table)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise HeadError(f"calibration.{KEY} in head.json can't be read ({error!r}): fit the head again") from None
        if len(at) != len(deviations) or list(at) != sorted(set(at)) or not all(map(math.isfinite, deviations)):
            raise HeadError(f"calibration.{KEY} in head.json needs a deviation for each of its points: fit it again")
        return curve

    def dump(self) -> dict[str, Any]:
        """The entry of a manifest's ``calibration``."""
        return asdict(self) | {"at": list(self.at), "deviations": list(self.deviations)}

    def gaps(self, max_loss: float) -> tuple[float, ...] | None:
        """How far below the best one a response may lie at each point, so that no more is lost; None where no row of
        the table is that careful.
        """
        careful = [row for row in self.table if row.upper <= max_loss]
        if not careful:
            return None
        z = min(careful, key=lambda row: row.drawn).z
        return tuple(z * deviation for deviation in self.deviations)


def rejection_gaps(
    calibration: Mapping[str, Any], max_loss: float, *, head: str
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The decision points of a value head, and how far below the best one a response may lie at each.

    Raises:
        InvalidField: the head is not calibrated for it, or not for so small a loss.
    """
    curve = RejectionCurve.load(calibration)
    if curve is None:
        raise InvalidField(
            f"head {head!r} is not calibrated for early rejection: fit a value head (inward fit value), again where "
            "this one was fitted anew, or give early_rejection.keep and at",
            param="early_rejection.max_loss",
        )
    gaps = curve.gaps(max_loss)
    if gaps is None:
        least = min((row.upper for row in curve.table), default=1.0)
        raise InvalidField(
            f"with head {head!r} a loss of at most {max_loss:g} can't be kept; its calibration reaches {least:.3g}: "
            "ask for that, or leave early_rejection out",
            param="early_rejection.max_loss",
        )
    return curve.at, gaps
