"""``/rerank``: the candidates of one prompt in the order of their scores, and the best against the worst."""

from __future__ import annotations

from inward.api.candidates import Candidate, Candidates, candidates
from inward.api.elements import with_confidence
from inward.api.scoring import Deadline, named
from inward.api.services import Services
from inward.types import HeadRef, Timing
from inward.wire import BestAgainstWorst, ErrorDetail, Ranked, RerankAnswer, RerankRequest


async def rank(services: Services, request: RerankRequest, head: HeadRef) -> tuple[RerankAnswer, Timing]:
    """Ranks the candidates; those that can't be scored stand last, each with its error.

    Raises:
        InwardError: none of them could be scored, or the service could not do its part.
    """
    deadline = Deadline(request.timeout, services.limits.timeout_s)
    return ranking(services, request, await candidates(services, request, with_confidence(services, head), deadline))


def ranking(services: Services, request: RerankRequest, found: Candidates) -> tuple[RerankAnswer, Timing]:
    """The answer that says what was found, and how long that took. Raises as ``rank``."""
    errors = [answer.error for answer in found.answers if answer.error is not None]
    if len(errors) == len(found.answers):
        raise errors[0]
    results = [one_ranked(i, found.answers[i], request) for i in found.order]
    answer = RerankAnswer(
        **named(services, [found.scored]),
        results=results,
        best=results[0],
        pair=_best_against_worst(request, results, found),
        listwise=found.scored.scores[0].listwise,
    )
    return answer, found.scored.timing


def one_ranked(index: int, answer: Candidate, request: RerankRequest) -> Ranked:
    """One candidate as the answer tells it."""
    if answer.error is not None:
        return Ranked(index=index, text=_unicode(answer.text), error=ErrorDetail(**answer.error.body()["error"]))
    return Ranked(
        index=index,
        text=answer.text,
        score=answer.score,
        probability=answer.probability,
        share=answer.share,
        completion_tokens=len(answer.ids),
        drawn_tokens=None if answer.not_drawn is None else len(answer.ids) + answer.held_back,
        not_drawn_tokens=answer.not_drawn,
        token_ids=list(answer.ids) if request.return_token_ids else None,
        finish_reason=answer.finish_reason,
        truncated=answer.truncated,
    )


def _best_against_worst(request: RerankRequest, results: list[Ranked], found: Candidates) -> BestAgainstWorst | None:
    """The pair, where two answers differ and their scores do."""
    cut = request.early_rejection is not None and request.early_rejection.in_pair
    finite = [r for r in results if r.score is not None and found.answers[r.index].finished]
    if not finite:
        return None
    best = finite[0]
    worst = next((r for r in reversed(results) if cut and r.finish_reason == "rejected"), finite[-1])
    margin = (best.score or 0.0) - (worst.score or 0.0)
    best_ids, worst_ids = (found.answers[result.index].ids for result in (best, worst))
    if margin <= 0 or best_ids == worst_ids:  # drawn one by one, equal answers may differ by rounding
        return None
    chosen, rejected = (found.answers[result.index].text for result in (best, worst))
    return BestAgainstWorst(
        prompt=request.asked()[0],
        chosen=chosen,
        rejected=rejected,
        chosen_score=best.score or 0.0,
        rejected_score=worst.score or 0.0,
        margin=margin,
        confidence=found.confidence(best.index, worst.index),
        chosen_finish_reason=best.finish_reason,
        rejected_finish_reason=worst.finish_reason,
    )


def _unicode(text: str) -> str | None:
    """``text``, if it can be sent."""
    return text if text.encode(errors="ignore").decode() == text else None
