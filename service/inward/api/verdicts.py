"""Heads as judges of texts: calibrated thresholds, and what lies below them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

from inward.api.compat import POINTWISE, Conversation, unit
from inward.api.scoring import MOST_SWITCHES, Deadline, find_head, score_groups, switched_too_often, tokenise
from inward.api.services import Services
from inward.errors import InvalidField, InwardError, NotFinite, NotFound
from inward.heads.calibration import Acceptable
from inward.prompts import Grouped
from inward.types import HeadRef, Scored
from inward.wire.verdicts import Verdict


@dataclass(frozen=True, slots=True)
class Judge:
    """A head and the score below which it flags a text."""

    ref: HeadRef
    threshold: float
    false_positives: float
    estimated: bool

    def verdict(self, score: float) -> Verdict:
        """On a text with this score."""
        return Verdict(
            score=score, threshold=self.threshold, false_positives=self.false_positives, estimated=self.estimated
        )

    def reason(self, score: float) -> str:
        """Why a text with this score is flagged, without the text."""
        rate = f"{'about ' if self.estimated else ''}{self.false_positives:.2%} false positives"
        return f"the head {self.ref.name!r} scores {score:.3f}, below its threshold {self.threshold:.3f} ({rate})"


def judges(services: Services, rate: float | None) -> list[Judge]:
    """All heads that judge one text by itself and are calibrated for this rate.

    Raises:
        NotFound: there are none.
        InvalidField: none of them is calibrated for such a rate.
    """
    names = [row["name"] for row in services.heads.listing() if row["kind"] in POINTWISE]
    calibrated = {name: acceptable for name in names if (acceptable := _acceptable(services, name)) is not None}
    if not calibrated:
        raise NotFound(f"no head is calibrated for thresholds; {_fit_again()}", param="head")
    found = []
    for name in calibrated:
        with suppress(InvalidField):
            found.append(judge(services, name, rate))
    if not found:
        known = ", ".join(f"{name!r} {one.rates[0]:g} to {one.rates[-1]:g}" for name, one in calibrated.items())
        raise InvalidField(
            f"a false-positive rate of {rate or services.false_positives:g} is not known for any head: their "
            f"calibrations tell: {known}",
            param="false_positives",
        )
    return found


def judge(services: Services, name: str | None, rate: float | None, param: str = "head") -> Judge:
    """One head.

    Raises:
        NotFound: there is no such head.
        InvalidField: it isn't calibrated, or not for such a rate.
    """
    ref = find_head(services, name, POINTWISE, param)
    rate = rate or services.false_positives
    acceptable = _acceptable(services, ref.name)
    if acceptable is None:
        raise InvalidField(f"head {ref.name!r} is not calibrated for thresholds; {_fit_again()}", param=param)
    return Judge(ref, acceptable.threshold(rate), rate, acceptable.estimated)


def _acceptable(services: Services, name: str) -> Acceptable | None:
    return Acceptable.load(services.heads.show(name).get("calibration") or {})


class OfHead(Protocol):
    """What is known of one version of a head."""

    @property
    def ref(self) -> HeadRef: ...


K = TypeVar("K", bound=OfHead)


async def judged(
    services: Services,
    conversations: Sequence[Conversation],
    known: Callable[[], Sequence[K]],
    field: str,
    deadline: Deadline | None = None,
) -> tuple[Sequence[K], list[Scored]]:
    """Each text, which came in the request's ``field``, by all heads of ``known`` in one pass; and what is known of
    those versions that have read them: a threshold is no other version's.

    Raises:
        InwardError: as ``read`` and ``known``; or heads were switched again and again meanwhile.
    """
    asked = known()
    for attempt in range(MOST_SWITCHES):
        names = [one.ref.name for one in asked]
        scored = await read(services, conversations, names, field, deadline, counted=attempt > 0)
        if _by(asked, scored):
            return asked, scored
        await services.heads.refresh()
        if _by(asked := known(), scored):
            return asked, scored
    raise switched_too_often()


def _by(asked: Sequence[OfHead], scored: Sequence[Scored]) -> bool:
    return all(one.heads == tuple(known.ref for known in asked) for one in scored)


async def read(
    services: Services,
    conversations: Sequence[Conversation],
    heads: Sequence[str],
    field: str,
    deadline: Deadline | None = None,
    *,
    counted: bool = False,
) -> list[Scored]:
    """Each text, which came in the request's ``field``, by all of the heads in one pass.

    Raises:
        InwardError: one of them could not be scored: a text that nobody read is not one that nobody objects to.
    """
    deadline = deadline or Deadline(None, services.limits.timeout_s)
    groups = []
    for i, grouped in enumerate(await tokenise(services, None, conversations, truncate=False)):
        if not isinstance(grouped, Grouped):
            raise grouped.at(f"{field}.{i}")
        groups.append(grouped.group)
    scored = []
    for i, outcome in enumerate(await score_groups(services, groups, tuple(heads), deadline, counted=counted)):
        if isinstance(outcome, InwardError):
            raise outcome.at(f"{field}.{i}")
        if any(None in scores.scores_N for scores in outcome.scores):
            raise NotFinite("the score is not a finite number", param=f"{field}.{i}")
        scored.append(outcome)
    return scored


def raw(scored: Scored, head: int) -> float:
    """What the ``head``-th of the heads says of a text that ``read`` gave."""
    score = scored.scores[head].scores_N[0]
    assert score is not None
    return score


def badness(scored: Scored, head: int) -> float:
    """The probability that the text is not acceptable, as far as the head is calibrated for it."""
    return 1.0 - unit(scored.scores[head], 0)


def _fit_again() -> str:
    return "a hybrid head fitted on pairs is, and a LEGEND head fitted with --validation"
