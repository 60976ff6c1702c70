"""The candidates of ``/rerank``, given in the request or drawn from the model, and what the head says of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from inward.api.elements import SCORE_KINDS
from inward.api.scoring import Deadline, find_head, score_groups
from inward.api.services import Services
from inward.errors import InvalidField, InwardError, NotFinite, TooLarge
from inward.heads.hybrid import confidence
from inward.heads.registry import KINDS
from inward.prompts import Grouped, Texts
from inward.types import (
    EarlyRejection,
    FinishReason,
    Group,
    Ids,
    Sample,
    SamplingSpec,
    Scored,
    Scores,
    StopRule,
    Usage,
    slowest,
)
from inward.wire import Parts, RerankRequest, Sampling
from inward.wire.requests import GuardOptions, RejectionOptions

MAX_TOKENS = 256
"""Of a drawn answer, where the request does not say."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One answer: scored, or with the error that it has instead."""

    text: str
    ids: Ids = ()
    score: float | None = None
    probability: float | None = None
    share: float | None = None
    """Of its list, by a listwise head."""
    reward: float | None = None
    """By the head that states confidences, if any does."""
    finish_reason: FinishReason | None = None
    error: InwardError | None = None
    held_back: int = 0
    """Tokens that were drawn and are not given."""
    not_drawn: int | None = None
    """Of a drawn one: at most so many more tokens would have been drawn, had it not been ended."""
    truncated: bool = False
    """Whether text of it or of what it answers was cut."""

    @property
    def finished(self) -> bool:
        """Whether it was given, or drawn to its end."""
        return self.finish_reason in (None, "stop", "length")

    @property
    def rank(self) -> tuple[int, float]:
        """The better, the smaller. Answers that a guard ended come after the others, and after them those that were
        rejected, since their scores may be another head's; last those that can't be scored.
        """
        if self.score is None:
            return 3, 0.0
        return {"guard": 1, "rejected": 2}.get(self.finish_reason or "", 0), -self.score


@dataclass(frozen=True, slots=True)
class Candidates:
    """All answers to one prompt, in the order in which they came."""

    scored: Scored
    answers: Sequence[Candidate]

    @property
    def order(self) -> list[int]:
        """Their places, the best first; equals, and those without a score, in the order in which they came."""
        return sorted(range(len(self.answers)), key=lambda i: self.answers[i].rank)

    def confidence(self, chosen: int, rejected: int) -> float | None:
        """Of two of them as a pair, by the last of the heads that scored them, where that one states any."""
        gamma = self.scored.scores[-1].gamma
        good, bad = self.answers[chosen].reward, self.answers[rejected].reward
        return None if gamma is None or good is None or bad is None else float(confidence(good, bad, **asdict(gamma)))


@dataclass(frozen=True, slots=True)
class Generation:
    """What is to be drawn."""

    prompt_ids: Ids
    spec: SamplingSpec
    truncated: bool

    def found(self, scored: Scored) -> Candidates:
        """What was drawn."""
        answers = [sampled(scored, i) for i in range(len(scored.samples))]
        return Candidates(scored, [self.counted(answer) for answer in answers])

    def counted(self, answer: Candidate) -> Candidate:
        """``answer``, which was drawn, with what was not drawn of it and what was cut for it."""
        left = self.spec.max_tokens - len(answer.ids) - answer.held_back
        return replace(answer, not_drawn=0 if answer.finished else left, truncated=self.truncated)


async def candidates(
    services: Services, request: RerankRequest, heads: tuple[str, ...], deadline: Deadline
) -> Candidates:
    """Scores the candidates, in one pass by all ``heads``, of which the first ranks; those that can't be scored have an
    error.

    Raises:
        InwardError: the service could not do its part.
    """
    if request.candidates is not None:
        return await _given(services, request, request.candidates, heads, deadline)
    wanted = await generation(services, request, heads[0])
    return wanted.found(await score_one(services, Group(wanted.prompt_ids, sampling=wanted.spec), heads, deadline))


async def generation(services: Services, request: RerankRequest, head: str) -> Generation:
    """What a request without candidates asks for, whose answers ``head`` ranks. Raises as ``to_draw``."""
    prompt, field = request.asked()
    texts = Texts(prompt, (), request.truncate)
    wanted = await to_draw(services, texts, field, request.n or 1, request.sampling or Sampling())
    return replace(wanted, spec=watched(services, wanted.spec, head, request.early_rejection, request.stop_when))


def watched(
    services: Services, spec: SamplingSpec, head: str, early: RejectionOptions | None, guard: GuardOptions | None
) -> SamplingSpec:
    """``spec`` with what may end an answer before its end, where ``head`` ranks.

    Raises:
        NotFound: a head that shall decide is not loaded.
        InvalidField: no answer is ever long enough to be rejected.
    """
    rejection, rule = _early_rejection(services, early, spec.max_tokens), _stop_rule(services, guard, head)
    return replace(spec, early_rejection=rejection, stop_when=rule)


async def to_draw(services: Services, texts: Texts, field: str, n: int, sampling: Sampling) -> Generation:
    """``n`` answers to the prompt of ``texts``, which came in the request's ``field``.

    Raises:
        InwardError: the prompt can't be used, or more is asked for than the model or the service gives.
    """
    if n > (most := services.limits.candidates):
        raise TooLarge(f"n is {n} and one request may draw {most} answers; send several", param="n")
    room = services.prompts.max_tokens - 1
    reserve = sampling.max_tokens or min(MAX_TOKENS, room // 4)
    (grouped,) = await services.prompts.group_many([replace(texts, reserve=reserve)])
    if isinstance(grouped, InwardError):
        raise grouped.at(Parts(texts.prompt, (), field, ()).blame(grouped.param))
    prompt_ids = grouped.group.prompt_ids
    if not prompt_ids:
        raise InvalidField("the prompt is empty: there is nothing to go on with", param=field)
    spec = _spec(n, sampling, room - len(prompt_ids))
    return Generation(prompt_ids, spec, grouped.truncated)


def _spec(n: int, sampling: Sampling, room: int) -> SamplingSpec:
    """``room``: tokens that the model takes after the prompt."""
    if (sampling.max_tokens or 1) > room:
        raise TooLarge(
            f"after the prompt the model takes {max(room, 0)} more tokens; ask for fewer, or shorten the prompt",
            param="sampling.max_tokens",
        )
    given = sampling.model_dump(exclude={"max_tokens", "stop"})
    return SamplingSpec(n, max_tokens=sampling.max_tokens or min(MAX_TOKENS, room), stop=tuple(sampling.stop), **given)


def _early_rejection(services: Services, asked: RejectionOptions | None, most: int) -> EarlyRejection | None:
    if asked is None:
        return None
    if asked.at is not None and asked.at[0] >= most:
        raise InvalidField(
            f"early_rejection.at begins with {asked.at[0]}, and an answer has at most {most} tokens: none would ever "
            "be rejected; decide earlier, or draw longer answers",
            param="early_rejection.at",
        )
    if asked.head is not None:
        find_head(services, asked.head, (*SCORE_KINDS, "value"), "early_rejection.head")
    return EarlyRejection(asked.keep, tuple(asked.at or ()), asked.max_loss, asked.head)


def _stop_rule(services: Services, asked: GuardOptions | None, head: str) -> StopRule | None:
    if asked is None:
        return None
    name = find_head(services, asked.head or head, SCORE_KINDS, "stop_when.head").name
    return StopRule(name, asked.below, asked.probability, asked.fpr, asked.pool or "", asked.after)


async def _given(
    services: Services, request: RerankRequest, texts: Sequence[str], heads: tuple[str, ...], deadline: Deadline
) -> Candidates:
    """All that can be used are one group, tokenised together as they are scored. Only where that fails, each is tried
    alone, to find those to blame.
    """
    (prompt, field), truncate = request.asked(), request.truncate

    async def group(places: Sequence[int]) -> Grouped | InwardError:
        return (await services.prompts.group_many([Texts(prompt, tuple(texts[i] for i in places), truncate)]))[0]

    usable = list(range(len(texts)))
    answers = [Candidate(text) for text in texts]
    grouped = await group(usable)
    if isinstance(grouped, InwardError):
        apart = await services.prompts.group_many([Texts(prompt, (text,), truncate) for text in texts])
        for i, alone in enumerate(apart):
            if isinstance(alone, InwardError):
                parts = Parts(prompt, (texts[i],), field, (f"candidates.{i}",))
                answers[i] = replace(answers[i], error=alone.at(parts.blame(alone.param)))
        usable = [i for i in usable if answers[i].error is None]
        if not usable:
            raise next(answer.error for answer in answers if answer.error is not None)
        grouped = await group(usable)
    if isinstance(grouped, InwardError):
        raise grouped
    pointwise = all(services.heads.resolve(name, KINDS).kind in SCORE_KINDS for name in heads)
    pieces = services.prompts.each(grouped) if pointwise else [(tuple(range(len(usable))), grouped)]
    outcomes = await score_groups(services, [piece.group for _, piece in pieces], heads, deadline)
    done: list[tuple[Sequence[int], Scored]] = []
    for (places, piece), outcome in zip(pieces, outcomes, strict=True):
        for n, i in enumerate(usable[place] for place in places):
            one = replace(answers[i], ids=piece.group.responses_ids[n], truncated=piece.truncated)
            if isinstance(outcome, InwardError):
                answers[i] = replace(one, error=outcome)
            else:
                answers[i] = answered(outcome, n, one, f"candidates.{i}")
        if not isinstance(outcome, InwardError):
            done.append(([usable[place] for place in places], outcome))
    if not done:
        raise next(outcome for outcome in outcomes if isinstance(outcome, InwardError))
    return Candidates(joined(done, len(texts)), answers)


def joined(parts: Sequence[tuple[Sequence[int], Scored]], n: int) -> Scored:
    """What was scored in parts, whose responses are these places of ``n``, as one, with no score in other places."""
    first = parts[0][1]

    def placed(values: Callable[[Scores], Sequence[float | None] | None], head: int) -> tuple[float | None, ...]:
        found: list[float | None] = [None] * n
        for places, scored in parts:
            for place, value in zip(places, values(scored.scores[head]) or (), strict=False):
                found[place] = value
        return tuple(found)

    scores = tuple(
        replace(
            one,
            scores_N=placed(lambda s: s.scores_N, head),
            probability_N=None if one.probability_N is None else placed(lambda s: s.probability_N, head),
            share_N=None if one.share_N is None else placed(lambda s: s.share_N, head),
        )
        for head, one in enumerate(first.scores)
    )
    usage = sum((scored.usage for _, scored in parts), Usage())
    return replace(first, scores=scores, usage=usage, timing=slowest(scored for _, scored in parts))


async def score_one(services: Services, group: Group, heads: tuple[str, ...], deadline: Deadline) -> Scored:
    """Scores a group, or raises why it can't be scored."""
    (scored,) = await score_groups(services, [group], heads, deadline)
    if isinstance(scored, InwardError):
        raise scored
    return scored


def sampled(scored: Scored, n: int) -> Candidate:
    """The ``n``-th sample, with what the heads say of it, or with the score that ended it."""
    sample = scored.samples[n]
    return answered(scored, n, drawn(sample)) if sample.finished else drawn(sample)


def drawn(sample: Sample) -> Candidate:
    """A sample of which no head has said anything but the score that ended it."""
    return Candidate(
        sample.text, sample.ids, sample.stop_score, finish_reason=sample.finish_reason, held_back=sample.held_back
    )


def answered(scored: Scored, n: int, candidate: Candidate, param: str | None = None) -> Candidate:
    """``candidate`` with what the heads say of the ``n``-th response."""
    scores = scored.scores[0]
    if scores.scores_N[n] is None:
        return replace(candidate, error=NotFinite("the score is not a finite number", param=param))
    reward = scored.scores[-1].scores_N[n]
    return replace(
        candidate,
        score=scores.scores_N[n],
        probability=scores.probability(n),
        share=scores.share(n),
        reward=reward,
    )
