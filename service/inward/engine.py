"""One batch in, exactly one outcome per job out: backbone, then heads."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from inward import logs, metrics
from inward.backbones.base import Backbone, OnEnded, OnTokens, stopped
from inward.backbones.decoding import before_stop
from inward.errors import EngineDead, InternalError, InwardError
from inward.heads.base import Head
from inward.heads.calibration import Deciles
from inward.heads.registry import Registry, Snapshot
from inward.heads.watch import HeadWatch, watch
from inward.queues.telling import Tell, Telling, TellingEnds
from inward.types import (
    Ended,
    Failed,
    Group,
    GroupReading,
    Ids,
    Job,
    Outcome,
    PairScores,
    Readout,
    Sample,
    SamplingSpec,
    Scored,
    Scores,
    Timing,
    Usage,
)

LOG = logs.logger("engine")


class Engine:
    """Runs batches on one backbone with the heads that are active when the batch begins.

    Args:
        backbone: owned by the caller, who closes it.
        registry: the loaded heads; each batch sees one snapshot, so that an answer comes wholly from one version.
    """

    def __init__(self, backbone: Backbone, registry: Registry, *, clock: Callable[[], float] = time.time) -> None:
        self.backbone = backbone
        self._registry = registry
        self._clock = clock

    async def run(self, jobs: Sequence[Job], tell: Tell | None = None) -> list[Outcome]:
        """Scores the jobs, in their order. A job that makes the batch fail fails alone: the others are computed again
        without it.

        Args:
            tell: takes the news of jobs that are told.

        Raises:
            EngineDead: the backbone can't compute any more; no job of the batch has an outcome.
        """
        started = self._clock()
        metrics.BATCH_JOBS.observe(len(jobs))
        metrics.BATCH_TOKENS.observe(sum(job.group.tokens for job in jobs))
        outcomes = await self._isolated(jobs, self._registry.snapshot(), tell)
        ended = self._clock()
        metrics.INFERENCE_SECONDS.observe(ended - started)
        return [
            replace(o, timing=Timing(max(0.0, started - job.enqueued), ended - started))
            for o, job in zip(outcomes, jobs, strict=True)
        ]

    async def _isolated(self, jobs: Sequence[Job], snapshot: Snapshot, tell: Tell | None) -> list[Outcome]:
        try:
            return await self._together(jobs, snapshot, tell)
        except EngineDead:
            raise
        except Exception as error:
            if len(jobs) > 1:  # halves find the one to blame in log2(n) steps and answer its neighbours
                middle = len(jobs) // 2
                first = await self._isolated(jobs[:middle], snapshot, tell)
                return first + await self._isolated(jobs[middle:], snapshot, tell)
            failure = (
                error if isinstance(error, InwardError) else InternalError(f"scoring failed ({type(error).__name__})")
            )
            defect = None if isinstance(error, InwardError) else error
            logs.event(LOG, "job_failed", job=jobs[0].id, code=failure.code, error=defect)
            return [_failed(jobs[0], failure)]

    async def _together(self, jobs: Sequence[Job], snapshot: Snapshot, tell: Tell | None) -> list[Outcome]:
        heads = {name: snapshot.resolve(name) for job in jobs for name in job.heads}
        tokens = any("tokens" in job.details for job in jobs) or any(head.pools for head in heads.values())
        readouts = [head.readout for head in heads.values()]
        given = [job.group for job in jobs if job.group.sampling is None]
        read = iter(await self.backbone.read(given, readouts, tokens=tokens) if given else ())
        return [
            self._scored(job, job.group, (), next(read), heads)
            if job.group.sampling is None
            else await self._drawn(job, job.group.sampling, readouts, tokens, heads, snapshot, tell)
            for job in jobs
        ]

    async def _drawn(
        self,
        job: Job,
        spec: SamplingSpec,
        readouts: Sequence[Readout],
        tokens: bool,
        heads: dict[str, Head],
        snapshot: Snapshot,
        tell: Tell | None,
    ) -> Outcome:
        """Of a job whose responses are drawn, and some of them perhaps not to their end."""
        looks = watch(spec, job.heads[0], snapshot)
        head = heads[job.heads[0]]
        async with (
            self._telling(job, spec, looks, tell) as on_tokens,
            self._telling_ends(job, spec, head, looks, tell) as on_ended,
        ):
            samples, reading = await self.backbone.sample_and_read(
                job.group, readouts, tokens=tokens, watch=looks, on_tokens=on_tokens, on_ended=on_ended
            )
        answered = Group(job.group.prompt_ids, tuple(sample.ids for sample in samples), spec)
        return self._scored(job, answered, tuple(samples), reading, heads)

    @asynccontextmanager
    async def _telling(
        self, job: Job, spec: SamplingSpec, looks: HeadWatch | None, tell: Tell | None
    ) -> AsyncGenerator[OnTokens | None, None]:
        """Who is told of the tokens of a job's one response; nobody, where its caller does not want to be."""
        if tell is None or not job.told or spec.n != 1:
            yield None
            return

        def text(ids: Ids) -> str:
            given = ids[: looks.give(0)] if looks is not None else ids
            return before_stop(self.backbone.certain(given), spec.stop)

        async with Telling(job.id, text, tell) as telling:
            yield telling.on_tokens

    @asynccontextmanager
    async def _telling_ends(
        self, job: Job, spec: SamplingSpec, head: Head, looks: HeadWatch | None, tell: Tell | None
    ) -> AsyncGenerator[OnEnded | None, None]:
        """Who is told when each of a job's several responses ends; nobody, where its caller does not want to be."""
        if tell is None or not job.told or spec.n == 1:
            yield None
            return
        version = self.backbone.policy_version

        async def rate(index: int, sample: Sample) -> Ended:
            return await self._rated(job, index, sample, head, looks, version)

        async with TellingEnds(job.id, looks.final if looks is not None else lambda index: True, rate, tell) as telling:
            if looks is not None:
                looks.on_decided = telling.look
            yield telling.on_ended

    async def _rated(
        self, job: Job, index: int, sample: Sample, head: Head, looks: HeadWatch | None, version: str
    ) -> Ended:
        """What is told of a response that has ended. Of one drawn to its end the head says its score, for which it is
        read by itself, and a guard whether it may be given at all.
        """
        if not sample.finished:
            return Ended(job.id, index, sample)
        guards = looks.readouts if looks is not None and looks.guards else ()
        group = Group(job.group.prompt_ids, (sample.ids,))
        (read,) = await self.backbone.read([group], [head.readout, *guards], tokens=head.pools or bool(guards))
        if looks is not None and guards:
            shown = [own.tokens_TK[0] for own in read.readings[1:] if own.tokens_TK is not None]
            if (stop := looks.check(index, shown)) is not None:
                return Ended(job.id, index, stopped(sample.ids, stop, self.backbone.certain))
        scores = head.score(read.readings[0])
        if scores.listwise or read.policy_version != version:
            return Ended(job.id, index, sample)
        probability = scores.probability(0)
        return Ended(job.id, index, sample, scores.scores_N[0], probability)

    def _scored(
        self, job: Job, group: Group, samples: tuple[Sample, ...], reading: GroupReading, heads: dict[str, Head]
    ) -> Outcome:
        metrics.COMPUTED_TOKENS_TOTAL.inc(reading.computed_tokens)
        metrics.PREFIX_TOKENS_SAVED_TOTAL.inc(reading.cached_tokens)
        order = list(heads)
        try:
            scores = [
                heads[name].score(reading.readings[order.index(name)], details=job.details, pair=job.pair)
                for name in job.heads
            ]
        except InwardError as error:  # a detail that this head does not have: this job's fault alone
            return _failed(job, error)
        read = [n for n in range(len(group.responses_ids)) if not samples or samples[n].finished]
        scores = [_alike(score, group.responses_ids, read) for score in scores]
        for name, score in zip(job.heads, scores, strict=True):
            _observe(heads[name], score, read, drawn=bool(samples))
        usage = _usage(group, samples, reading.cached_tokens)
        _observe_stops(samples, usage)
        refs = tuple(heads[name].ref for name in job.heads)
        info = self.backbone.info
        return Scored(
            job.id, refs, tuple(scores), reading.policy_version, usage, samples,
            fingerprint=info.fingerprint, dtype=info.dtype,
        )  # fmt: skip


def _failed(job: Job, error: InwardError) -> Failed:
    return Failed(job.id, error.code, error.message, param=error.param)


def _usage(group: Group, samples: Sequence[Sample], cached: int) -> Usage:
    """``group``: with its responses, and how they were drawn, if they were."""
    given = sum(map(len, group.responses_ids))
    usage = Usage(len(group.responses_ids) * len(group.prompt_ids), given, cached)
    if group.sampling is None:
        return usage
    drawn = [len(sample.ids) + sample.held_back for sample in samples]
    left = [group.sampling.max_tokens - n for n, sample in zip(drawn, samples, strict=True) if not sample.finished]
    return replace(usage, drawn_tokens=sum(drawn), not_drawn_tokens=sum(left))


def _alike(scores: Scores, responses_ids: Sequence[Ids], read: Sequence[int]) -> Scores:
    """``scores`` with the same for equal responses, which rounding tells apart; so a pair of them is a tie exactly.
    ``read``: which of them have scores at all.
    """
    first = {responses_ids[n]: n for n in reversed(read)}
    if len(first) == len(responses_ids):
        return scores
    with_score = set(read)
    places = [first[ids] if n in with_score else n for n, ids in enumerate(responses_ids)]
    return replace(
        scores,
        scores_N=tuple(scores.scores_N[n] for n in places),
        probability_N=scores.probability_N and tuple(scores.probability_N[n] for n in places),
        layers_N=scores.layers_N and tuple(scores.layers_N[n] for n in places),
        tokens_N=scores.tokens_N and tuple(scores.tokens_N[n] for n in places),
        map_N=scores.map_N and tuple(scores.map_N[n] for n in places),
        share_N=scores.share_N and tuple(scores.share_N[n] for n in places),
        pair=scores.pair and _tie(scores.pair),
    )


def _tie(pair: PairScores) -> PairScores:
    """``pair`` with equal answers: no margin and no verdict, where there is anything to be said."""
    if pair.margin is None:
        return pair
    return PairScores(
        margin=0.0,
        margin_scaled=None if pair.margin_scaled is None else 0.0,
        bin=pair.bin,
        label_agrees=None,
        label_probability=None if pair.label_probability is None else 0.5,
        confidence=None if pair.confidence is None else 0.5,
    )


def _observe_stops(samples: Sequence[Sample], usage: Usage) -> None:
    for reason in ("guard", "rejected"):
        if stopped := sum(sample.finish_reason == reason for sample in samples):
            metrics.EARLY_STOPS_TOTAL.labels(reason=reason).inc(stopped)
    if samples:
        metrics.DRAWN_TOKENS_TOTAL.inc(usage.drawn_tokens)
        metrics.NOT_DRAWN_TOKENS_TOTAL.inc(usage.not_drawn_tokens)


def _observe(head: Head, scores: Scores, read: Sequence[int], *, drawn: bool) -> None:
    if drawn and scores.listwise and len(scores.scores_N) == 1:
        return  # of a list that is still to come, or of none
    name, version = head.ref.name, str(head.ref.version)
    deciles = Deciles.load(head.manifest.calibration)
    finite = [score for n in read if (score := scores.scores_N[n]) is not None]
    if len(finite) < len(read):
        metrics.ABSTENTIONS_TOTAL.labels(head=name).inc(len(read) - len(finite))
    for score in finite:
        metrics.SCORES.labels(head=name, version=version).observe(score)
        if deciles is not None:
            metrics.deciles(name, version)[deciles.tenth(score) - 1].inc()
    if drawn and len(finite) > 1:
        metrics.BEST_OF_N_GAIN.labels(head=name).observe(max(finite) - sum(finite) / len(finite))
    if scores.pair is not None:
        _observe_pair(name, version, scores.pair)


def _observe_pair(name: str, version: str, pair: PairScores) -> None:
    if pair.label_agrees is not None:
        metrics.LABEL_AGREEMENT_TOTAL.labels(head=name, agrees=str(pair.label_agrees).lower()).inc()
    if pair.margin is not None:
        metrics.MARGINS.labels(head=name, version=version).observe(pair.margin)
    if pair.confidence is not None:
        metrics.CONFIDENCES.labels(head=name).observe(pair.confidence)
