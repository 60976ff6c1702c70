"""The invariants of the path of a request, with real queue, worker and engine around a backbone without a model."""

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest

from inward.errors import DeadlineExceeded, EngineDead, InternalError, InvalidField, NotFound, Overloaded, TooLarge
from inward.heads.pooling import Pool
from inward.types import Group, PairScores, SamplingSpec, Scored, Scores, StopRule
from inward.worker import DRAWINGS_HELD
from support.corridor import Corridor, FakeHead, FakeRegistry, corridor, groups
from support.small_heads import legend
from support.waiting import PATIENCE, until


def values(answers):
    return np.array([a.scores[0].scores_N for a in answers])


def scores(answers):
    """``[jobs, N]``; equal within float32 rounding, which depends on the shape of a batch."""
    return pytest.approx(values(answers), abs=1e-5)


async def test_answers_come_in_the_order_of_the_groups_and_equal_those_computed_alone():
    wanted = groups(60, responses=2)
    async with corridor(tokens=200) as c:
        together = await c.score(wanted)
        alone = [(await c.score([group]))[0] for group in wanted]
    assert values(together) == scores(alone)


async def test_many_callers_at_once_each_get_their_own_answer():
    async with corridor(tokens=300, delay_per_token=1e-5) as c:
        wanted = [groups(5, seed=seed) for seed in range(32)]
        answers = await asyncio.gather(*(c.score(w) for w in wanted))
        for w, answer in zip(wanted, answers, strict=True):
            assert values(answer) == scores(await c.score(w))
        assert c.queue.tokens == 0


async def test_a_batch_that_raises_fails_only_the_job_to_blame():
    bad = groups(1, seed=99)[0]
    async with corridor() as c:
        c.backbone.fail_on(lambda group: group == bad)
        good = groups(9)
        answers = await c.score([*good[:4], bad, *good[4:]])
    assert [isinstance(a, Scored) for a in answers] == [True] * 4 + [False] + [True] * 5
    assert isinstance(answers[4], InternalError)


async def test_a_head_that_does_not_exist_and_a_detail_it_does_not_have_fail_alone():
    async with corridor() as c:
        fine, missing, refused = await asyncio.gather(
            c.score(groups(1)), c.score(groups(1), heads=("absent",)), c.score(groups(1), details=frozenset({"layers"}))
        )
    assert isinstance(fine[0], Scored)
    assert isinstance(missing[0], NotFound)
    assert isinstance(refused[0], InvalidField)
    assert refused[0].param == "detail"


async def test_more_than_the_queue_holds_is_refused_and_nothing_is_half_admitted():
    async with corridor(max_tokens=500) as c:
        async with c.busy(groups(15)) as first:
            held = c.queue.tokens
            with pytest.raises(Overloaded) as caught:
                await c.score(groups(20, seed=1))
            assert c.queue.tokens == held
        assert caught.value.retry_after > 0
        assert all(isinstance(a, Scored) for a in await first)
    assert c.queue.tokens == 0


async def test_nobody_waits_beyond_the_deadline_and_late_work_is_not_computed():
    async with corridor(tokens=50) as c:
        late = groups(3, seed=5)
        async with c.busy(groups(10)) as others:
            with pytest.raises(DeadlineExceeded):
                await c.score(late, timeout=0.05)
        await others
    assert not set(late) & set(c.backbone.computed)


async def test_a_caller_that_left_is_not_computed():
    async with corridor(tokens=50) as c:
        gone = groups(5, seed=7)
        async with c.busy(groups(5)) as others:
            held = c.queue.tokens
            leaving = asyncio.create_task(c.score(gone))
            await until(lambda: c.queue.tokens > held)
            leaving.cancel()
        await others
    assert not set(gone) & set(c.backbone.computed)
    assert c.queue.tokens == 0


async def test_the_next_batch_fills_while_the_device_works():
    async with corridor(tokens=10_000) as c:
        more = groups(19, seed=1)
        async with c.busy(groups(1)) as first:
            held = c.queue.tokens
            rest = [asyncio.create_task(c.score([group])) for group in more]
            await until(lambda: c.queue.tokens == held + sum(group.tokens for group in more))
        await asyncio.gather(first, *rest)
    assert c.backbone.calls == 2  # one alone, since the device was idle; all the others together


async def test_a_dead_engine_answers_everybody_and_admits_nobody():
    c = Corridor(delay_per_token=1e-3, tokens=60)
    running = asyncio.create_task(c.worker.run())
    callers = [asyncio.create_task(c.score(groups(4, seed=s))) for s in range(5)]
    await asyncio.sleep(0.05)
    c.backbone.die()
    answers = [a for answer in await asyncio.gather(*callers) for a in answer]
    assert any(isinstance(a, EngineDead) for a in answers)
    assert all(isinstance(a, EngineDead | Scored) for a in answers)
    await asyncio.wait_for(running, PATIENCE)
    assert c.worker.dead
    with pytest.raises(EngineDead):
        await c.score(groups(1))


async def test_closing_drains_everything_that_was_accepted():
    c = Corridor(delay_per_token=1e-4, tokens=100)
    running = asyncio.create_task(c.worker.run())
    callers = [asyncio.create_task(c.score(groups(10, seed=s))) for s in range(8)]
    await asyncio.sleep(0.01)
    await c.queue.close()
    answers = [a for answer in await asyncio.gather(*callers) for a in answer]
    await asyncio.wait_for(running, PATIENCE)
    assert len(answers) == 80
    assert all(isinstance(a, Scored) for a in answers)


async def test_each_answer_comes_wholly_from_one_version_of_a_head_and_names_it():
    versions = {v: FakeHead(version=v, seed=v) for v in (1, 2)}
    async with corridor(tokens=100) as c:
        wanted = groups(40, responses=2)
        expected = {}
        for v, head in versions.items():
            c.registry.heads = {"plain": head}
            expected[v] = values(await c.score(wanted))
        read = c.backbone.read

        async def switched_meanwhile(*args, **options):
            c.registry.heads = {"plain": versions[c.backbone.calls % 2 + 1]}
            return await read(*args, **options)

        c.backbone.read = switched_meanwhile
        answers = await c.score(wanted)
    for i, answer in enumerate(answers):
        assert answer.scores[0].scores_N == pytest.approx(expected[answer.heads[0].version][i], abs=1e-5)
    assert {a.heads[0].version for a in answers} == {1, 2}


async def test_usage_counts_a_prompt_for_each_response_and_what_was_not_computed_again():
    async with corridor() as c:
        [scored] = await c.score([Group((1, 2, 3, 4, 5), ((6, 7), (8,), (9, 9, 9)))])
    assert (scored.usage.prompt_tokens, scored.usage.completion_tokens, scored.usage.cached_tokens) == (15, 6, 10)


async def test_samples_are_drawn_scored_and_returned_in_order():
    async with corridor() as c:
        [scored] = await c.score([Group((1, 2, 3), sampling=SamplingSpec(n=4, max_tokens=6, seed=1))])
        again = await c.score([Group((1, 2, 3), tuple(s.ids for s in scored.samples))])
    assert len(scored.samples) == 4
    assert values([scored]) == scores(again)


@pytest.mark.parametrize("leaves", ["by its deadline", "by itself"])
async def test_sampling_is_cut_short_once_nobody_waits_for_it(leaves, monkeypatch):
    monkeypatch.setattr("inward.worker.POLL_INTERVAL_S", 0.01)
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def draw(group, readouts, **options):
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with corridor() as c:
        c.backbone.sample_and_read = draw
        group = Group((1, 2, 3), sampling=SamplingSpec(n=2))
        caller = asyncio.create_task(c.score([group]))
        await started.wait()
        if leaves == "by itself":
            caller.cancel()
        else:
            c.worker._clock = lambda: time.time() + 2 * PATIENCE
        await asyncio.wait_for(cancelled.wait(), PATIENCE)
        [left] = await asyncio.gather(caller, return_exceptions=True)
        assert isinstance(left, asyncio.CancelledError) or isinstance(left[0], DeadlineExceeded)
        c.worker._clock = time.time
        assert len(await c.score(groups(1))) == 1
    assert c.queue.tokens == 0


async def test_scores_are_computed_while_a_backbone_draws_beside_them():
    started, go_on = asyncio.Event(), asyncio.Event()
    async with corridor() as c:
        draw = c.backbone.sample_and_read

        async def slow(group, readouts, **options):
            started.set()
            await go_on.wait()
            return await draw(group, readouts, **options)

        c.backbone.sample_and_read = slow
        c.worker._capacity, c.worker._most_drawings = replace(c.backbone.capacity, drawings=2), None
        drawings = [
            asyncio.create_task(c.score([Group((1, 2, i), sampling=SamplingSpec(n=8, max_tokens=512))]))
            for i in range(5)
        ]
        await asyncio.wait_for(started.wait(), PATIENCE)
        for _ in range(3):
            assert len(await c.score(groups(2))) == 2
        assert len(c.worker._drawing) == 2
        go_on.set()
        assert [len(scored.samples) for [scored] in await asyncio.gather(*drawings)] == [8] * 5


@asynccontextmanager
async def drawing_slowly(c, drawings):
    """Draws up to ``drawings`` at a time beside the batches, each until the event that comes with the prompts under
    way is set."""
    under_way, go_on = [], asyncio.Event()
    draw = c.backbone.sample_and_read

    async def slow(group, readouts, **options):
        under_way.append(group.prompt_ids)
        await go_on.wait()
        try:
            return await draw(group, readouts, **options)
        finally:
            under_way.remove(group.prompt_ids)

    c.backbone.sample_and_read = slow
    c.worker._capacity = replace(c.backbone.capacity, drawings=drawings)
    c.worker._most_drawings = DRAWINGS_HELD * drawings
    try:
        yield under_way, go_on
    finally:
        go_on.set()


def to_draw(i):
    return Group((1, 2, i), sampling=SamplingSpec(n=1, max_tokens=4))


async def test_a_worker_holds_no_more_to_draw_than_it_can_begin_soon():
    async with corridor(tokens=10) as c, drawing_slowly(c, 1) as (under_way, go_on):
        drawings = [asyncio.create_task(c.score([to_draw(i)])) for i in range(20)]
        await until(lambda: under_way and c.worker._taking is None)
        assert len(c.worker._waiting) == DRAWINGS_HELD + 1
        go_on.set()
        assert len(await asyncio.gather(*drawings)) == 20


async def test_where_nobody_else_draws_scores_wait_for_no_drawing_however_many_there_are():
    async with corridor(tokens=10) as c, drawing_slowly(c, 1) as (under_way, go_on):
        c.worker._most_drawings = None
        drawings = [asyncio.create_task(c.score([to_draw(i)])) for i in range(20)]
        await until(lambda: under_way)
        assert len(await c.score([Group((1, 2), ((3,),))])) == 1
        assert not any(drawing.done() for drawing in drawings)
        go_on.set()
        await asyncio.gather(*drawings)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("pool", [None, Pool(name="mean"), Pool(name="max_ema")], ids=lambda pool: pool and pool.name)
async def test_where_a_guard_ends_all_answers_they_have_no_score_whether_or_not_the_head_pools(pool, n):
    guarding = legend(width=16, name="guarding", layers=(4,), position="mean", pool=pool, calibration={})
    spec = SamplingSpec(n, max_tokens=12, seed=1, stop_when=StopRule("guarding", below=1e9))
    async with corridor() as c:
        c.registry.heads = {"guarding": guarding}
        (scored,) = await c.score([Group((5, 6, 7), sampling=spec)], heads=("guarding",))
    assert isinstance(scored, Scored), scored
    assert [sample.finish_reason for sample in scored.samples] == ["guard"] * n
    assert scored.scores[0].scores_N == (None,) * n


async def test_a_job_that_may_end_its_worker_runs_when_nothing_else_does():
    async with corridor() as c, drawing_slowly(c, 4) as (under_way, go_on):
        take = c.queue.take

        async def taken(tokens):
            return [replace(job, alone=job.group == to_draw(7)) for job in await take(tokens)]

        c.queue.take = taken
        before = asyncio.create_task(c.score([to_draw(1)]))
        await until(lambda: under_way)
        suspect = asyncio.create_task(c.score([to_draw(7)]))
        await until(lambda: any(job.alone for job in c.worker._waiting))
        after = asyncio.create_task(c.score([to_draw(2)]))
        assert len(await c.score(groups(2))) == 2  # scores wait for no drawing
        assert under_way == [(1, 2, 1)]
        c.backbone.fail_on(lambda group: group == to_draw(7) and len(c.worker._running) > 1)
        go_on.set()
        for task in (before, suspect, after):
            assert isinstance((await task)[0], Scored)


async def test_pairs_bring_pair_fields():
    async with corridor() as c:
        [scored] = await c.score(groups(1, responses=2), pair=True)
    a, b = scored.scores[0].scores_N
    assert scored.scores[0].pair == PairScores(a - b, label_agrees=a > b)


class NoisyHead(FakeHead):
    """Tells equal responses apart, as rounding does, and is as sure as can be."""

    def score(self, reading, *, details=frozenset(), pair=False):
        scores = tuple(float(i) for i in range(len(reading.values_NK)))
        compared = PairScores(scores[0] - scores[1], 1e-7, 0.0, False, 0.9, 0.99) if pair else None
        return Scores(scores, scores, tokens_N=tuple((s,) for s in scores), pair=compared)


async def test_equal_responses_are_a_tie_by_their_tokens_whatever_rounding_says():
    prompt, answer, other = (1, 2), (3, 4), (3, 5)
    async with corridor() as c:
        c.registry = c.engine._registry = FakeRegistry(NoisyHead())
        [tie] = await c.score([Group(prompt, (answer, answer))], pair=True)
        [listed] = await c.score([Group(prompt, (other, answer, other))])
    assert tie.scores[0] == Scores((0.0, 0.0), (0.0, 0.0), tokens_N=((0.0,), (0.0,)), pair=TIE)
    assert listed.scores[0].scores_N == (0.0, 1.0, 0.0)


TIE = PairScores(0.0, 0.0, 0.0, label_agrees=None, label_probability=0.5, confidence=0.5)


@pytest.mark.parametrize(
    "long",
    [Group((1,) * 60, ((2,) * 4,)), Group((1,) * 64), Group((1, 2), sampling=SamplingSpec(n=2, max_tokens=62))],
)
async def test_what_is_longer_than_the_model_takes_is_refused_by_the_worker_too(long):
    fits = [Group((1,) * 60, ((2,) * 3,)), Group((1, 2), sampling=SamplingSpec(n=1, max_tokens=61, seed=1))]
    async with corridor(max_length=64) as c:
        first, refused, last = await c.score([fits[0], long, fits[1]])
    assert isinstance(first, Scored) and isinstance(last, Scored)
    assert isinstance(refused, TooLarge) and "the model takes 64" in refused.message
    assert long not in c.backbone.computed


@pytest.mark.parametrize("when", ["while it computes", "while it waits"])
async def test_a_device_that_makes_no_progress_ends_the_worker_and_its_jobs_are_given_back(when, monkeypatch):
    monkeypatch.setattr("inward.worker.POLL_INTERVAL_S", 0.01)
    c = Corridor()
    running = asyncio.create_task(c.worker.run())
    if when == "while it computes":
        async with c.busy(groups(2)) as waiting:  # the call never comes back
            c.backbone.healthy = lambda: False
            answers = await waiting
        assert all(isinstance(answer, EngineDead) for answer in answers)
    else:
        c.backbone.healthy = lambda: False
    await asyncio.wait_for(running, PATIENCE)
    assert "no progress" in c.worker.dead
    with pytest.raises(EngineDead):
        await c.score(groups(1))


async def test_a_defect_that_ends_the_workers_loop_leaves_nobody_waiting():
    c = Corridor()

    async def broken(jobs):
        raise KeyError("what somebody wrote")

    c.queue.wanted = broken
    running = asyncio.create_task(c.worker.run())
    [answer] = await c.score(groups(1))
    assert isinstance(answer, EngineDead) and "KeyError" in answer.message
    await asyncio.wait_for(running, PATIENCE)


async def test_an_outcome_that_cannot_be_sent_is_a_failure_and_not_silence():
    async with corridor() as c:
        settle, calls = c.queue.settle, []

        async def unsendable(outcomes):
            calls.append(outcomes)
            if len(calls) == 1:
                raise TypeError("this can't be sent")
            await settle(outcomes)

        c.queue.settle = unsendable
        [answer] = await c.score(groups(1))
    assert isinstance(answer, InternalError)
