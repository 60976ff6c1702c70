"""``inward dead-letters list | show | replay | drop``."""

from __future__ import annotations

import argparse
import asyncio
import json

from inward.commands.options import add_settings, settings_of

SETTINGS = ("redis_url", "redis_urls", "queue", "model", "revision")


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Looks at the dead letters of a queue in Redis: jobs that ended several workers, or that nobody could read."
    )
    parser.epilog = "example: inward dead-letters list --redis-url redis://localhost:6379/0"
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
        description="Sends dead letters to the workers again and prints what becomes of them. Those that are scored "
        "are no dead letters any more. A job that crashes workers will do so again: replay it once the cause is "
        "mended. Exit status 1 if any failed.",
    )
    drop = verbs.add_parser("drop", help="delete them", description="Deletes dead letters.")
    show.add_argument("entry", help="as `list` prints it")
    for verb in (replay, drop):
        verb.add_argument("entries", nargs="*", metavar="ENTRY", help="as `list` prints them")
        verb.add_argument("--all", action="store_true", help="all of them")
    for verb in (listing, show, replay, drop):
        add_settings(verb, SETTINGS)


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    from inward.processes.dead_letters import DeadLetterQueue

    async with DeadLetterQueue.open(settings_of(args)) as queue:
        if args.verb == "list":
            for letter in await queue.letters.all():
                print(json.dumps(letter.described()))
        elif args.verb == "show":
            [letter] = await queue.letters.chosen([args.entry])
            print(json.dumps(queue.shown(letter, text=args.text), indent=2))
        elif args.verb == "drop":
            chosen = await queue.letters.chosen(args.entries, everything=args.all)
            print(f"{await queue.letters.drop([letter.entry for letter in chosen])} dropped")
        else:
            chosen = await queue.letters.chosen(args.entries, everything=args.all)
            problems = []
            async for letter, problem in queue.replayed(chosen):
                problems.append(problem)
                told = {"entry": letter.entry, "job": letter.job_id, "scored": problem is None, "error": problem}
                print(json.dumps(told))
            return int(any(problems))
    return 0
