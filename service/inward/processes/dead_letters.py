"""What ``inward dead-letters`` does: looks at jobs that were given up, and has them scored again."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from inward.errors import InwardError
from inward.processes.supervisor import Supervisor
from inward.processes.wiring import AnyProducer, RedisServers, connect, find_model, model_name
from inward.queues.redis.dead_letters import DeadLetter, DeadLetters
from inward.settings import Settings
from inward.stores.keys import Keys
from inward.types import Failed

PATIENCE_S = 600.0
"""For one letter."""


@dataclass(frozen=True, slots=True)
class DeadLetterQueue:
    """The dead letters of a queue, and the way back into it."""

    settings: Settings
    shards: RedisServers
    keys: Keys
    letters: DeadLetters

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings) -> AsyncIterator[DeadLetterQueue]:
        """Around the Redis of the settings.

        Raises:
            SetupError: none is set, or it refuses us.
        """
        shards = connect(settings)
        try:
            await shards.check()
            keys = Keys(settings.queue or model_name(settings))
            yield cls(settings, shards, keys, DeadLetters(shards.connections, keys))
        finally:
            await shards.close()

    def shown(self, letter: DeadLetter, *, text: bool) -> dict[str, Any]:
        """One letter with its sizes, and with its text where that is asked for."""
        shown, job = letter.described(), letter.job
        if job is None:
            return shown
        shown |= {
            "prompt_tokens": len(job.group.prompt_ids),
            "response_tokens": [len(ids) for ids in job.group.responses_ids],
            "pair": job.pair,
            "priority": job.priority,
        }
        if text:
            from inward.backbones.tokenizer import load_tokenizer

            tokenizer = load_tokenizer(find_model(self.settings).folder)
            shown["prompt"] = tokenizer.decode(list(job.group.prompt_ids))
            shown["responses"] = [tokenizer.decode(list(ids)) for ids in job.group.responses_ids]
        return shown

    async def replayed(self, letters: Sequence[DeadLetter]) -> AsyncIterator[tuple[DeadLetter, str | None]]:
        """Each letter, scored again, and why it could not be, or None: then it is a dead letter no more."""
        producer, tasks = self.shards.producer(self.keys, max_tokens=2**62), Supervisor()
        await producer.live()
        tasks.watch("signs of life", producer.keep_living)
        tasks.watch("answers", producer.keep_receiving)
        try:
            for letter in letters:  # one by one: a job that crashes its worker shall take no other one along
                problem = await _again(producer, letter)
                if problem is None:
                    await self.letters.drop([letter.entry])
                yield letter, problem
        finally:
            await tasks.stop()
            await producer.leave()


async def _again(producer: AnyProducer, letter: DeadLetter) -> str | None:
    job, now = letter.job, time.time()
    if job is None:
        return "it can't be read by this version"
    if letter.backbone not in (None, producer.served):
        return f"it is for another backbone ({letter.backbone}) than the queue is served with now ({producer.served})"
    try:
        [answer] = await producer.submit([replace(job, deadline=now + PATIENCE_S, enqueued=now, deliveries=1)])
        outcome = await answer
    except InwardError as error:
        return error.message
    return outcome.message if isinstance(outcome, Failed) else None
