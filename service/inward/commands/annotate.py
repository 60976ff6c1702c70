"""``inward annotate``: a file of preference pairs in, the same file with margins and confidences out."""

from __future__ import annotations

import argparse
import os
from functools import partial

from inward import logs
from inward.commands.options import MODEL_SETTINGS, add_settings, settings_of

HELP = """\
Reads preference pairs and writes every row with new columns: margin, margin_scaled, margin_bin, label_probability,
confidence, chosen_score, rejected_score, label_agrees. IN and OUT are .jsonl, .csv (also .gz) or .parquet files; IN may
also be one JSON array, a folder of such files or a dataset that was saved to disk, OUT is a folder then.

Rows that can't be annotated go to OUT.rejected.jsonl with the reason; what annotated is written to OUT.annotation.json
(and into the metadata of Parquet). A job that was stopped goes on where it was when the same command is given again.
"""
EXAMPLES = """\
examples:
  inward annotate pairs.jsonl annotated.parquet
  inward annotate pairs.parquet annotated.parquet --model Qwen/Qwen2.5-0.5B-Instruct --heads ./heads --html look.html
  inward annotate qa.csv out.csv --columns prompt=question,chosen=good,rejected=bad --url http://127.0.0.1:8080
  inward annotate pairs.jsonl for_training.parquet --trl     # prompt, chosen, rejected, margin: TRL's RewardTrainer
  inward annotate pairs.jsonl corrected.jsonl --apply decisions.csv      # what was decided on the page of --html
"""


def add(parser: argparse.ArgumentParser) -> None:
    from inward.offline.annotate.options import add_arguments

    parser.description = HELP
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_arguments(parser)
    add_settings(parser, (*MODEL_SETTINGS, "heads", "vllm_options"))


def run(args: argparse.Namespace) -> int:
    from inward.commands.in_process import in_process
    from inward.offline.annotate.options import AnnotateOptions
    from inward.offline.annotate.run import annotate
    from inward.offline.annotate.scorer import at_url

    logs.configure("error", json=False)
    options = AnnotateOptions.of(args)
    if options.url is not None:
        return annotate(options, partial(at_url, options, os.environ.get("INWARD_API_KEY")))
    return annotate(options, partial(in_process, options, settings_of(args)))
