"""``inward dead-letters list | show | replay | drop``."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from redis.exceptions import RedisError

from inward.backbones.tokenizer import load_tokenizer
from inward.commands import COMMANDS
from inward.commands.options import add_settings, settings_of
from inward.errors import InwardError, NotFound, SetupError
from inward.processes.wiring import connect, find_model, model_name
from inward.queues.redis.dead_letters import DeadLetter, DeadLetters
from inward.queues.redis.producer import RedisProducer
from inward.settings import Settings
from inward.stores.connection import Connection, unavailable
from inward.stores.keys import Keys
from inward.types import Failed, Job


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "dead-letters",
        help=COMMANDS["dead-letters"],
        description="Looks at the dead letters of a queue in Redis: jobs that ended several workers, or that nobody could read.",
        epilog="example: inward dead-letters list --redis-url redis://localhost:6379/0",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="list|show|replay|drop", required=True)
    listing = verbs.add_parser(
        "list", help="all of them, oldest first", description="Lists all dead letters, without their text."
    )
    show = verbs.add_parser(
        "show", help="what one of them is", description="Prints one dead letter: sizes and heads, not its text."
    )
    show.add_argument("--text", action="store_true", help="with the text of prompt and responses")
    replay = verbs.add_parser(
        "replay",
        help="have them scored again",
        description="Sends dead letters to the workers again and prints what becomes of them. Those that are scored are no dead letters "
        "any more. A job that crashes workers will do so again: replay it once the cause is mended. Exit status 1 if "
        "any failed.",
    )
    drop = verbs.add_parser("drop", help="delete them", description="Deletes dead letters.")
    show.add_argument("entry", help="as `list` prints it")
    for verb in (replay, drop):
        verb.add_argument("entries", nargs="*", metavar="ENTRY", help="as `list` prints them")
        verb.add_argument("--all", action="store_true", help="all of them")
    for verb in (listing, show, replay, drop):
        add_settings(verb, ("redis_url", "queue", "model", "revision"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_run(args, settings_of(args)))


async def _run(args: argparse.Namespace, settings: Settings) -> int:
    connection = connect(settings)
    keys = Keys(settings.queue or model_name(settings))
    letters = DeadLetters(connection, keys)
    verbs: dict[str, Callable[[], Awaitable[int]]] = {
        "list": lambda: _list(letters),
        "show": lambda: _show(letters, args.entry, settings if args.text else None),
        "replay": lambda: _replay(letters, args, connection, keys),
        "drop": lambda: _drop(letters, args),
    }
    try:
        await connection.check()
        return await verbs[args.verb]()
    except (RedisError, OSError) as error:
        raise unavailable(error) from None
    finally:
        await connection.close()


async def _list(letters: DeadLetters) -> int:
    for letter in await letters.all():
        print(json.dumps(_described(letter)))
    return 0


async def _show(letters: DeadLetters, entry: str, settings: Settings | None) -> int:
    [letter] = await _chosen(letters, [entry])
    described, job = _described(letter), letter.job
    if job is not None:
        responses = [len(ids) for ids in job.group.responses_ids]
        described |= {
            "prompt_tokens": len(job.group.prompt_ids),
            "response_tokens": responses,
            "pair": job.pair,
            "priority": job.priority,
        }
    if job is not None and settings is not None:
        tokenizer = load_tokenizer(find_model(settings).folder)
        described["prompt"] = tokenizer.decode(list(job.group.prompt_ids))
        described["responses"] = [tokenizer.decode(list(ids)) for ids in job.group.responses_ids]
    print(json.dumps(described, indent=2))
    return 0


async def _replay(letters: DeadLetters, args: argparse.Namespace, connection: Connection, keys: Keys) -> int:
    chosen = await _chosen(letters, args.entries, everything=args.all)
    producer = RedisProducer(connection, keys, max_tokens=2**62)
    await producer.open()
    failed = 0
    try:
        for letter in chosen:  # one by one: a job that crashes its worker shall take no other one along
            problem = await _again(producer, letter.job)
            failed += problem is not None
            print(
                json.dumps({"entry": letter.entry, "job": letter.job_id, "scored": problem is None, "error": problem})
            )
            if problem is None:
                await letters.drop([letter.entry])
    finally:
        await producer.leave()
    return 1 if failed else 0


async def _again(producer: RedisProducer, job: Job | None) -> str | None:
    """Why it could not be scored, or None."""
    if job is None:
        return "it can't be read by this version"
    now = time.time()
    try:
        [answer] = await producer.submit([replace(job, deadline=now + 600, enqueued=now, deliveries=1)])
        outcome = await answer
    except InwardError as error:
        return error.message
    return outcome.message if isinstance(outcome, Failed) else None


async def _drop(letters: DeadLetters, args: argparse.Namespace) -> int:
    chosen = await _chosen(letters, args.entries, everything=args.all)
    print(f"{await letters.drop([letter.entry for letter in chosen])} dropped")
    return 0


async def _chosen(letters: DeadLetters, entries: list[str], *, everything: bool = False) -> list[DeadLetter]:
    """Raises ``NotFound`` for an entry that isn't there, ``SetupError`` where none is named."""
    if not entries and not everything:
        raise SetupError("name the entries as `inward dead-letters list` prints them, or say --all")
    there = {letter.entry: letter for letter in await letters.all()}
    if missing := [entry for entry in entries if entry not in there]:
        raise NotFound(f"there is no dead letter {missing[0]}; `inward dead-letters list` prints those that there are")
    return list(there.values()) if everything else [there[entry] for entry in entries]


def _described(letter: DeadLetter) -> dict[str, Any]:
    job = letter.job
    given_up = datetime.fromtimestamp(int(letter.entry.partition("-")[0]) / 1000, UTC)
    return {
        "entry": letter.entry,
        "given_up": given_up.isoformat(timespec="seconds"),
        "job": letter.job_id,
        "deliveries": letter.deliveries,
        "reason": letter.reason,
        "heads": list(job.heads) if job else None,
        "tokens": job.group.tokens if job else None,
    }
