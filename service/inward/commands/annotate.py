"""``inward annotate``: a file of preference pairs in, the same file with margins and confidences out."""

from __future__ import annotations

import argparse
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from inward import logs
from inward.commands import COMMANDS
from inward.commands.options import MODEL_SETTINGS, add_settings, settings_of
from inward.settings import Settings

if TYPE_CHECKING:
    from inward.offline.annotate.options import AnnotateOptions
    from inward.offline.annotate.scorer import Scorer, TokenScores
    from inward.types import Floats

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
ALONE = {
    "timeout": 1e6, "api_keys": frozenset[str](), "max_body_bytes": 2**30, "queue_tokens": 10**9, "sharing_window": 0.0,
}  # fmt: skip
"""In this process nobody is kept waiting by much work at once, and nobody calls."""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from inward.offline.annotate.options import add_arguments

    parser = commands.add_parser(
        "annotate", help=COMMANDS["annotate"], description=HELP, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_arguments(parser)
    add_settings(parser, (*MODEL_SETTINGS, "heads", "vllm_options"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from inward.offline.annotate.options import AnnotateOptions
    from inward.offline.annotate.run import annotate
    from inward.offline.annotate.scorer import at_url

    logs.configure("error", json=False)
    options = AnnotateOptions.of(args)
    if options.url is not None:
        return annotate(options, partial(at_url, options, os.environ.get("INWARD_API_KEY")))
    return annotate(options, partial(_in_process, options, settings_of(args).model_copy(update=ALONE)))


@asynccontextmanager
async def _in_process(options: AnnotateOptions, settings: Settings) -> AsyncIterator[Scorer]:
    """The model of the settings, loaded here: each pair is scored as a row of a bulk job is."""
    from inward.api.rows import score_rows, token_scores
    from inward.offline.annotate.scorer import RowScorer, TokenScores
    from inward.processes.standalone import Standalone
    from inward.wire import Options

    house = await Standalone.open(settings)
    try:
        request = Options(truncate=options.truncate)
        score = partial(score_rows, house.services, "margin", head=options.head, options=request)

        def fit_of(head: str) -> Mapping[str, Any]:
            fit: Mapping[str, Any] = house.services.heads.show(head).get("fit", {})
            return fit

        async def tokens_of(head: str, pairs: Sequence[Mapping[str, Any]]) -> list[TokenScores | None]:
            found = await token_scores(house.services, pairs, head=head, options=request)
            return [TokenScores(*both) if both else None for both in found]

        async def states_of(pairs: Sequence[Any]) -> Floats:
            import numpy as np

            from inward.offline.states.read import extract_pairs

            middle = [round(house.backbone.info.layers / 2)]
            states = await extract_pairs(house.backbone, house.prompts, pairs, layers=middle, position="mean")
            both = [states.chosen_NLD[:, 0], states.rejected_NLD[:, 0]]
            return np.asarray(np.mean(both, axis=0), dtype=np.float32)

        yield RowScorer(score, house.info(), house.backbone.capacity.tokens, fit_of, tokens_of, states_of)
    finally:
        await house.close(timeout=5.0)
