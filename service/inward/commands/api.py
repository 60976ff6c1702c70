"""``inward api``: talks HTTP and owns no backbone; its workers are found through Redis."""

from __future__ import annotations

import argparse

from inward.commands.options import add_settings, settings_of


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "One API replica: HTTP, templates and tokenisation, no GPU and no torch. Workers (`inward worker`) "
        "are found through Redis; until there is one, and whenever Redis is away, /readyz is red and requests get a "
        "503."
    )
    parser.epilog = (
        "example: inward api --redis-url redis://localhost:6379/0 --model Qwen/Qwen2.5-0.5B-Instruct --port 9000"
    )
    add_settings(parser)


def run(args: argparse.Namespace) -> int:
    from inward.processes import server
    from inward.processes.api import ApiProcess

    settings = settings_of(args)
    server.check_reachability(settings)
    return server.run("api", settings, ApiProcess.open)
