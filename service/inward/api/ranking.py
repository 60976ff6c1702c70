"""``/rerank``: the candidates of one prompt in the order of their scores, and the best against the worst."""

from __future__ import annotations

from inward.api.candidates import Candidate, Candidates, candidates
from inward.api.scoring import Deadline, hybrid_head, named, score_groups
from inward.api.services import Services
from inward.errors import InwardError
from inward.types import Group, HeadRef, Scored, Timing
from inward.wire import BestAgainstWorst, ErrorDetail, Ranked, RerankAnswer, RerankRequest


async def rank(services: Services, request: RerankRequest, head: HeadRef) -> tuple[RerankAnswer, Timing]:
    """Ranks the candidates; those that can't be scored stand last, each with its error.

    Raises:
        InwardError: none of them could be scored, or the service could not do its part.
    """
    deadline = Deadline(request.timeout, services.limits.timeout_s)
    return await ranking(services, request, await candidates(services, request, head.name, deadline), deadline)


async def ranking(
    services: Services, request: RerankRequest, found: Candidates, deadline: Deadline
) -> tuple[RerankAnswer, Timing]:
    """The answer that says what was found, and how long that took. Raises as ``rank``."""
    errors = [answer.error for answer in found.answers if answer.error is not None]
    if len(errors) == len(found.answers):
        raise errors[0]
    results = _results(found, request)
    pair, compared = await _best_against_worst(services, request, results, found, deadline)
    answer = RerankAnswer(
        **named(services, [found.scored, compared] if compared else [found.scored]),
        results=results,
        best=results[0],
        pair=pair,
        listwise=found.scored.scores[0].listwise,
    )
    return answer, found.scored.timing


def _results(found: Candidates, request: RerankRequest) -> list[Ranked]:
    """Best first; equals, and those without a score, in the order in which they came."""
    ranked = [one_ranked(i, answer, request, found.truncated) for i, answer in enumerate(found.answers)]
    return sorted(ranked, key=lambda r: (r.score is None, -(r.score or 0.0)))


def one_ranked(index: int, answer: Candidate, request: RerankRequest, truncated: bool) -> Ranked:
    """One candidate as the answer tells it."""
    if answer.error is not None:
        return Ranked(index=index, text=_unicode(answer.text), error=ErrorDetail(**answer.error.body()["error"]))
    return Ranked(
        index=index,
        text=answer.text,
        score=answer.score,
        probability=answer.probability,
        completion_tokens=len(answer.ids),
        token_ids=list(answer.ids) if request.return_token_ids else None,
        finish_reason=answer.finish_reason,
        truncated=truncated,
    )


async def _best_against_worst(
    services: Services, request: RerankRequest, results: list[Ranked], found: Candidates, deadline: Deadline
) -> tuple[BestAgainstWorst | None, Scored | None]:
    """The pair, where two answers differ and their scores do, and what was computed for its confidence."""
    finite = [result for result in results if result.score is not None]
    best, worst = finite[0], finite[-1]
    margin = (best.score or 0.0) - (worst.score or 0.0)
    best_ids, worst_ids = (found.answers[result.index].ids for result in (best, worst))
    if margin <= 0 or best_ids == worst_ids:  # drawn one by one, equal answers may differ by rounding
        return None, None
    compared = await _compared(services, found.pair(best.index, worst.index), found.scored, deadline)
    confidence = compared.scores[0].pair.confidence if compared and compared.scores[0].pair else None
    chosen, rejected = (found.answers[result.index].text for result in (best, worst))
    pair = BestAgainstWorst(
        prompt=request.asked()[0],
        chosen=chosen,
        rejected=rejected,
        chosen_score=best.score or 0.0,
        rejected_score=worst.score or 0.0,
        margin=margin,
        confidence=confidence,
        chosen_finish_reason=best.finish_reason,
        rejected_finish_reason=worst.finish_reason,
    )
    return pair, compared


async def _compared(services: Services, extremes: Group, ranked: Scored, deadline: Deadline) -> Scored | None:
    """What the hybrid head says of best against worst; None where none is loaded, or where it was switched since the
    ranking.
    """
    name = hybrid_head(services)
    if name is None:
        return None
    (outcome,) = await score_groups(services, [extremes], (name,), deadline, pair=True)
    if isinstance(outcome, InwardError) or outcome.version[1:] != ranked.version[1:]:
        return None
    return outcome if outcome.heads == ranked.heads or name != ranked.heads[0].name else None


def _unicode(text: str) -> str | None:
    """``text``, if it can be sent."""
    return text if text.encode(errors="ignore").decode() == text else None
