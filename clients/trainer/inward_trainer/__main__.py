"""``inward-train``: cdpo, rm, export, paper. Also ``python -m inward_trainer``, for ``accelerate launch -m``."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from inward_trainer import __version__
from inward_trainer.errors import TrainerError
from inward_trainer.options import CdpoOptions, ExportOptions, PaperOptions, RewardOptions, add_options, read_options

CDPO = """\
Three ways to begin, each resumable by the same command:

  a file of pairs, annotated by the service as they are used
    inward-train cdpo --model M --url http://127.0.0.1:8080 --pairs pairs.jsonl --out runs/a

  pairs of the policy itself, and a policy that moves (the service runs with --adapters adapters)
    inward-train cdpo --model M --url http://127.0.0.1:8080 --source samples --prompts prompts.jsonl --steps 200 \\
        --adapters adapters --publish-every 10 --update-head --monitor monitor --held-out held_out.jsonl --out runs/b

  pairs that others have scored meanwhile, from the service's Redis
    inward-train cdpo --model M --source stream --redis-url redis://127.0.0.1 --stream pairs --steps 1000 --out runs/c

Several GPUs:  accelerate launch -m inward_trainer cdpo …

Ablations of arXiv 2503.10093: --confidence plain | fixed | pair | batch, --scale raw | squashed, --update-head or not.
Every option may also be given as INWARD_TRAIN_<NAME>, or in a recipe: --recipe NAME or FILE.
The log is OUT/log.jsonl, a line a step; OUT/tensorboard has the same; the result is OUT/final.
"""
RM = """\
  inward-train rm --model M --url http://127.0.0.1:8080 --pairs pairs.jsonl --out runs/rm

asks the service's LEGEND head for the margin of every pair, and trains a reward model that keeps it.
Every option may also be given as INWARD_TRAIN_<NAME>, or in a recipe: --recipe NAME or FILE.
"""


EXPORT = """\
  inward-train export --adapter runs/a/final --out policy                       one model, for any server
  inward-train export --adapter runs/a/best --no-merge --out a --push-to org/a  the adapter, on the hub

Every option may also be given as INWARD_TRAIN_<NAME>, or in a recipe: --recipe FILE.
"""


PAPER = """\
  inward-train paper --data DATA --out runs/paper                    all tables, and OUT/report.html
  inward-train paper --data DATA --out runs/paper --tables judge     one; then several at once, on one GPU:
  for t in hybrid hybrid legend srr; do inward-train paper --data DATA --out runs/paper --tables $t & done; wait

Needs the service's package with its extra: pip install 'inward[standard]'. OUT/work has weights and texts that must
not be passed on. Every option may also be given as INWARD_TRAIN_<NAME>, or in a recipe: --recipe FILE.
"""


FULL = ("No space left on device", "PytorchStreamWriter failed writing")
"""What safetensors and torch say, whose errors are not the system's."""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="inward-train", description="Trains policies and reward models on what an Inward service says."
    )
    top.add_argument("--version", action="version", version=f"inward-train {__version__}")
    commands = top.add_subparsers(dest="command", metavar="cdpo|rm|export|paper", required=True)
    for name, about, epilog, options, module in (
        ("cdpo", "align a policy: DPO with a confidence per pair", CDPO, CdpoOptions, "cdpo"),
        ("rm", "train a reward model with margins", RM, RewardOptions, "rm"),
        ("export", "merge an adapter into its model, and upload it", EXPORT, ExportOptions, "export"),
        ("paper", "measure the papers' tables anew on one model, and write a report", PAPER, PaperOptions, "paper.run"),
    ):
        form = argparse.RawDescriptionHelpFormatter
        command = commands.add_parser(name, help=about, description=about, epilog=epilog, formatter_class=form)
        command.set_defaults(options=options, module=f"inward_trainer.{module}")
        add_options(command, options)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. What a user can mend is one line on standard error, and exit status 2; a run that was stopped
    has the exit status of its signal.
    """
    args = parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for name in ("inward_trainer", "inward_client"):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        status: int = import_module(args.module).run(read_options(args.options, args))
        _end_if_several(status)
        return status
    except KeyboardInterrupt:
        problem, status = "interrupted; the same command goes on from the last checkpoint", 128 + signal.SIGINT
    except Exception as error:
        found = mendable(error)
        if found is None:
            raise
        problem, status = found, 2
    print(f"inward-train {args.command}: {problem}", file=sys.stderr)
    _end_if_several(status)
    return status


def _end_if_several(status: int) -> None:
    """Ends a process of a run of several at once, without taking Python down: gloo's threads let go of tensors after
    the last exchange, and one that asks for Python's lock while Python ends aborts the process.
    """
    distributed = sys.modules.get("torch.distributed")  # where none of it was used, it is not imported for this
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def mendable(error: Exception) -> str | None:
    """What to tell of an error that a user can mend; None of one that is a defect."""
    if isinstance(error, TrainerError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"a package is missing: pip install {error.name}"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or any(said in str(error) for said in FULL):
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        return f"the disk is full{where}; the same command goes on when there is room"
    if isinstance(error, PermissionError | FileExistsError | NotADirectoryError | IsADirectoryError) or (
        isinstance(error, OSError) and error.errno in (errno.EROFS, errno.ENAMETOOLONG)
    ):
        return f"{error.filename} can't be written or read: {error.strerror}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for this
        return "the device has too little memory: a smaller --batch-size with more --accumulate, a smaller --max-length"
    return None


if __name__ == "__main__":
    sys.exit(main())
