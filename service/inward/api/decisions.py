"""OpenAI's decisions: questions that a head or a ranker can answer, and refusals where none can."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from inward.api.candidates import Candidates, candidates
from inward.api.compat import POINTWISE, Conversation
from inward.api.scoring import Deadline, is_head
from inward.api.services import Services
from inward.api.verdicts import judged
from inward.errors import InvalidField, NotFound
from inward.heads.calibration import Deciles
from inward.types import HeadRef, Kind, Scored, Scores, Usage
from inward.wire import RerankRequest
from inward.wire.compat import conversation
from inward.wire.verdicts import (
    ChoiceDecision,
    ChoiceProbability,
    DecisionRequest,
    Level,
    LevelProbability,
    PredicateDecision,
    Question,
    Refusal,
    ScoreDecision,
)

RANKERS: tuple[Kind, ...] = ("srr", "hybrid", "legend", "ensemble")
Decision = PredicateDecision | ChoiceDecision | ScoreDecision | Refusal


@dataclass(frozen=True, slots=True)
class Known:
    """A head, and how its scores are spread, if that is known."""

    ref: HeadRef
    deciles: Deciles | None


async def decide(services: Services, request: DecisionRequest) -> tuple[list[Decision], Usage]:
    """Answers in the order of the questions, and what they cost.

    Raises:
        InwardError: the input can't be read, or the service could not do its part.
    """
    request.check()
    deadline = Deadline(None, services.limits.timeout_s)
    given = conversation(request.input, "input")
    turns = [{"role": "user", "content": given}] if isinstance(given, str) else given
    named = [None if one.type == "choice" else _head(services, request, one) for one in request.questions]
    heads = sorted({name for name in named if name is not None})
    known: dict[str, Known] = {}
    usage = Usage()
    scored: Scored | None = None
    choices = any(one.type == "choice" for one in request.questions)
    if heads and not (choices and _unread(turns)):  # a choice is asked after all turns
        found, (scored,) = await judged(
            services, [_judged(turns)], lambda: [_known(services, name) for name in heads], "input", deadline
        )
        known = {one.ref.name: one for one in found}
        usage += scored.usage
    answers: list[Decision] = []
    for i, (question, name) in enumerate(zip(request.questions, named, strict=True)):
        if question.type == "choice":
            answer, cost = await _choose(services, request, i, turns, deadline)
            usage += cost
        elif name is None or scored is None:
            answer = Refusal(name=question.name)
        else:
            answer = _answer(question, known[name], scored.scores[heads.index(name)])
        answers.append(answer)
    return answers, usage


def _unread(turns: Sequence[dict[str, str]]) -> bool:
    """Whether heads, which judge answers, would leave out turns."""
    return len(turns) > 1 and turns[-1]["role"] != "assistant"


def _judged(turns: Sequence[dict[str, str]]) -> Conversation:
    """The last turn, as an answer to those before it.

    Raises:
        InvalidField: it is none, and heads would not read those before it.
    """
    *before, last = turns
    if _unread(turns):
        raise InvalidField(
            f"the last turn is of the role {last['role']!r}: heads judge one text, or an answer to the turns before; "
            "send the last turn alone, or end with the assistant's",
            param="input",
        )
    return Conversation(before or "", last["content"])


def _head(services: Services, request: DecisionRequest, question: Question) -> str | None:
    """The head that knows what is asked; None where there is none."""
    for name in [one for one in (question.name, request.head, request.model) if one is not None]:
        try:
            return services.heads.resolve(name, POINTWISE).name
        except NotFound:
            if name in (question.name, request.head) or is_head(services, name):
                return None
    try:
        return services.heads.resolve(services.compat_head, POINTWISE).name
    except NotFound:
        return None


def _known(services: Services, name: str) -> Known:
    ref = services.heads.resolve(name, POINTWISE)
    return Known(ref, Deciles.load(services.heads.show(name).get("calibration") or {}))


def _answer(question: Question, head: Known, scores: Scores) -> Decision:
    if question.type == "predicate":
        probability = scores.probability(0)
        if probability is None:  # not calibrated for it
            return Refusal(name=question.name)
        return PredicateDecision(name=question.name, probability=probability)
    score = scores.scores_N[0]
    if head.deciles is None or score is None:
        return Refusal(name=question.name)
    return _levels(question.name, question.levels or [], head.deciles.quantile(score))


def _levels(name: str | None, levels: Sequence[Level], quantile: float) -> ScoreDecision:
    """On levels that hold equal shares of the calibration set, with its place between the middles of two of them."""
    place = min(max(quantile * len(levels) - 0.5, 0.0), len(levels) - 1.0)
    probabilities = [max(0.0, 1.0 - abs(place - i)) for i in range(len(levels))]
    return ScoreDecision(
        name=name,
        score=place,
        confidence=max(probabilities),
        probabilities=[
            LevelProbability(label=level.label, value=i, probability=probabilities[i]) for i, level in enumerate(levels)
        ],
    )


async def _choose(
    services: Services, request: DecisionRequest, i: int, turns: Sequence[dict[str, str]], deadline: Deadline
) -> tuple[Decision, Usage]:
    """Asks the question after the input, with its choices as the answers to rank."""
    question = request.questions[i]
    choices = question.choices or []
    try:
        head = services.heads.resolve(services.rerank_head, RANKERS)
    except NotFound:
        return Refusal(name=question.name), Usage()
    texts, asked = [choice.text for choice in choices], request.instructions(i)

    async def ranked(turns: Sequence[dict[str, str]]) -> Candidates:
        ranking = RerankRequest.model_validate({"messages": [*turns], "candidates": texts, "head": head.name})
        return await candidates(services, ranking, (head.name,), deadline)

    try:
        found = await _asked_after(turns, asked, ranked)
    except InvalidField as error:
        raise error.at("input") from None
    scores = [answer.score for answer in found.answers]
    if None in scores:
        return Refusal(name=question.name), found.scored.usage
    shares = _softmax([score for score in scores if score is not None])
    best = max(range(len(shares)), key=shares.__getitem__)
    decision = ChoiceDecision(
        name=question.name,
        choice=choices[best].value,
        confidence=shares[best],
        probabilities=[
            ChoiceProbability(value=choice.value, probability=share)
            for choice, share in zip(choices, shares, strict=True)
        ],
    )
    return decision, found.scored.usage


async def _asked_after(
    turns: Sequence[dict[str, str]], question: str, ranked: Callable[[Sequence[dict[str, str]]], Awaitable[Candidates]]
) -> Candidates:
    """With the question as a turn of its own; in the last one where the chat template wants other turns in between."""
    try:
        return await ranked([*turns, {"role": "user", "content": question}])
    except InvalidField:
        *before, last = turns
        if last["role"] != "user":
            raise
        return await ranked([*before, {"role": "user", "content": f"{last['content']}\n\n{question}"}])


def _softmax(scores: Sequence[float]) -> list[float]:
    highest = max(scores)
    weights = [math.exp(score - highest) for score in scores]
    return [weight / sum(weights) for weight in weights]
