"""``inward worker``: owns a backbone and takes jobs from Redis."""

from __future__ import annotations

import argparse

from inward.commands.options import add_settings, settings_of

PORT = 9100
"""Of a worker's status, where none is named."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "One worker: loads a model and its heads and takes jobs from Redis until SIGTERM, then finishes "
        "what it has. Its port answers /livez, /readyz, /info and /metrics only. Exit status 1 if the engine died: "
        "start it again."
    )
    parser.epilog = (
        "example: inward worker --redis-url redis://localhost:6379/0 --model Qwen/Qwen2.5-0.5B-Instruct "
        "--heads ./heads --port 9100"
    )
    add_settings(parser)


def run(args: argparse.Namespace) -> int:
    from inward.processes import server
    from inward.processes.worker import WorkerProcess

    return server.run("worker", settings_of(args), WorkerProcess.open, unnamed=PORT)
