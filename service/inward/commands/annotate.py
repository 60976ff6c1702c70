"""``inward annotate``: a file of preference pairs in, the same file with margins and confidences out."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from inward.commands import COMMANDS
from inward.commands.options import MODEL_SETTINGS, add_settings

HELP = """\
Reads preference pairs and writes every row with new columns: margin, margin_scaled, margin_bin, confidence, chosen_score,
rejected_score, label_agrees. IN and OUT are JSON lines (.jsonl, .jsonl.gz), .csv or .parquet
files; IN may also be a folder of such files or a dataset that was saved to disk, OUT is a folder then.

Rows that can't be annotated go to OUT.rejected.jsonl with the reason; what annotated is written to OUT.annotation.json (and into the
metadata of Parquet). A job that was stopped goes on where it was when the same command is given again.
"""
EXAMPLES = """\
examples:
  inward annotate pairs.jsonl annotated.parquet
  inward annotate pairs.parquet annotated.parquet --model Qwen/Qwen2.5-0.5B-Instruct --heads ./heads --html look.html
  inward annotate qa.csv out.csv --columns prompt=question,chosen=good,rejected=bad --url http://127.0.0.1:8080
  inward annotate pairs.jsonl for_training.parquet --trl     # prompt, chosen, rejected, margin in [0, 1]: for TRL's RewardTrainer
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "annotate", help=COMMANDS["annotate"], description=HELP, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "input", metavar="IN", type=Path, help="a file, a folder of files, or a dataset that was saved to disk"
    )
    parser.add_argument(
        "output", metavar="OUT", type=Path, help="a file, or for several tables a folder; its ending decides the format"
    )
    what = parser.add_argument_group("what is read and written")
    what.add_argument(
        "--layout", default="auto", metavar="NAME", help="hh, pku, trl, chat or sharegpt (default: recognised)"
    )
    what.add_argument(
        "--columns", default="", metavar="OURS=THEIRS,…", help="names of the dataset's columns, such as prompt=question"
    )
    what.add_argument(
        "--trl", action="store_true", help="rewrite the pair as prompt, chosen, rejected; margin is the bin, in [0, 1]"
    )
    what.add_argument("--prefix", default="", help="put before the names of the new columns")
    what.add_argument(
        "--replace-columns", action="store_true", help="overwrite columns that are there already under these names"
    )
    what.add_argument(
        "--head", metavar="NAME", help="head that gives the margins (default: the only legend or hybrid one)"
    )
    what.add_argument(
        "--truncate",
        action="store_true",
        help="cut text that is longer than the model takes, instead of leaving the row out",
    )
    what.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each table")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--url",
        metavar="URL",
        help="a running service, instead of loading the model here (key: $INWARD_API_KEY, or in the URL)",
    )
    how.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: one model per actor, on the Ray cluster at $RAY_ADDRESS",
    )
    how.add_argument(
        "--actors", type=int, default=1, metavar="N", help="with --engine ray: how many models (default: 1)"
    )
    how.add_argument(
        "--gpus", type=float, default=0.0, metavar="N", help="with --engine ray: GPUs for each actor (default: 0)"
    )
    how.add_argument(
        "--at-once",
        type=int,
        metavar="N",
        help="chunks of 256 rows in flight (default: 1, which is reproducible; with --url 4)",
    )
    how.add_argument(
        "--restart", action="store_true", help="throw away what an interrupted job has done, and an OUT that is there"
    )
    look = parser.add_argument_group("what is shown in the end")
    look.add_argument(
        "--suspicious",
        type=int,
        nargs="?",
        const=10,
        default=0,
        metavar="N",
        help="print the N (10) most suspicious pairs",
    )
    look.add_argument(
        "--html", type=Path, metavar="FILE", help="a page for looking through the 200 most suspicious pairs"
    )
    look.add_argument("--json", action="store_true", help="print the summary as JSON")
    add_settings(parser, (*MODEL_SETTINGS, "heads", "vllm_options"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from inward.offline.annotate.run import annotate

    return annotate(args, key=os.environ.get("INWARD_API_KEY"))
