"""``inward serve``: API and worker in one process, around a queue in memory."""

from __future__ import annotations

import argparse

from inward.commands.options import add_settings, settings_of


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Loads one model and serves its heads over HTTP: API and worker in one process. Without options: "
        "SmolLM2-135M-Instruct with its heads on http://127.0.0.1:8080, without a model hub or a GPU."
    )
    parser.epilog = "example: inward serve --model Qwen/Qwen2.5-0.5B-Instruct --heads ./heads --port 9000"
    add_settings(parser)


def run(args: argparse.Namespace) -> int:
    from inward.processes import server
    from inward.processes.standalone import Standalone

    settings = settings_of(args)
    server.check_reachability(settings)
    return server.run("serve", settings, Standalone.open)
