"""Elements of an answer's list: what heads say of one item or pair, whether it came in a request or in a bulk job.

``where`` is the path of the element, which an error of it names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from inward.api.scoring import Result
from inward.api.services import Services
from inward.errors import NotFound
from inward.types import HeadRef, Ids, Kind, Scores
from inward.wire import Margin, RewardPair, Score

MARGIN_KINDS: tuple[Kind, ...] = ("legend", "hybrid", "ensemble")
SCORE_KINDS: tuple[Kind, ...] = ("legend", "hybrid", "ensemble")
REWARD_KINDS: tuple[Kind, ...] = ("hybrid", "ensemble")
"""Those that state a confidence."""
RERANK_KINDS: tuple[Kind, ...] = ("hybrid", "legend", "srr", "ensemble")


def with_confidence(services: Services, head: HeadRef) -> tuple[str, ...]:
    """The head, and the hybrid one that gives the confidence of a pair, where that is another and is loaded."""
    if head.kind in REWARD_KINDS:
        return (head.name,)
    try:
        return head.name, services.heads.resolve(None, ("hybrid",)).name
    except NotFound:
        return (head.name,)


def margin(result: Result, where: str | None) -> Margin:
    """Of a pair that was scored ``with_confidence``."""
    scores, error = result.scores(), result.error(where)
    if scores is None or scores.pair is None or error is not None:
        return Margin(error=error, truncated=result.truncated)
    pair = scores.pair
    return Margin(
        truncated=result.truncated,
        margin=pair.margin,
        margin_scaled=pair.margin_scaled,
        bin=pair.bin,
        chosen_score=scores.scores_N[0],
        rejected_score=scores.scores_N[1],
        label_agrees=pair.label_agrees,
        label_probability=pair.label_probability,
        confidence=_confidence(result),
    )


def _confidence(result: Result) -> float | None:
    """From the second head asked, where the first isn't the hybrid one."""
    of = result.scores(1) or result.scores()
    return of.pair.confidence if of and of.pair else None


def score(result: Result, where: str | None, pieces: Callable[[Ids], list[str]] | None = None) -> Score:
    """Of one item; ``pieces`` tells the texts of its tokens, where scores at tokens were asked for."""
    scores, error = result.scores(), result.error(where)
    if scores is None or error is not None:
        return Score(error=error, truncated=result.truncated)
    return Score(
        truncated=result.truncated,
        score=scores.scores_N[0],
        probability=scores.probability(0),
        layers=_layers(scores, 0),
        tokens=_tokens(scores, 0),
        token_texts=pieces(result.responses_ids[0]) if pieces and scores.tokens_N else None,
        map=[list(row) for row in scores.map_N[0]] if scores.map_N else None,
    )


def reward_pair(result: Result, where: str | None) -> RewardPair:
    """Of a pair that was scored by a hybrid head."""
    scores, error = result.scores(), result.error(where)
    if scores is None or scores.pair is None or error is not None:
        return RewardPair(error=error, truncated=result.truncated)
    pair = scores.pair
    return RewardPair(
        truncated=result.truncated,
        chosen_score=scores.scores_N[0],
        rejected_score=scores.scores_N[1],
        chosen_probability=scores.probability(0),
        rejected_probability=scores.probability(1),
        margin=pair.margin,
        label_agrees=pair.label_agrees,
        label_probability=pair.label_probability,
        confidence=pair.confidence,
        confidence_calibrated=pair.label_probability,
        chosen_layers=_layers(scores, 0),
        rejected_layers=_layers(scores, 1),
        chosen_tokens=_tokens(scores, 0),
        rejected_tokens=_tokens(scores, 1),
    )


def _layers(scores: Scores, n: int) -> dict[str, Any] | None:
    if not scores.layers_N:
        return None
    return {name: list(part) for name, part in asdict(scores.layers_N[n]).items() if part is not None}


def _tokens(scores: Scores, n: int) -> list[float] | None:
    return list(scores.tokens_N[n]) if scores.tokens_N else None
