"""Preference pairs through a datatrove pipeline: each gets its margin from a running service, and files are shared out
among tasks.

    inward serve --model toy &
    python examples/datatrove_margins.py --input pairs/ --out margins/ --tasks 8 --workers 4

Input: a folder of JSONL files with prompt, chosen and rejected. Output: the same rows with ``margin``,
``label_agrees`` and what else the service says of a pair, or ``error`` where it could not score one; rows whose label
it doubts can be dropped (``--drop-disagreeing``). A task that is done is not done again, so the same command goes on
after an interruption; on a cluster give the same pipeline to datatrove's ``SlurmPipelineExecutor``.

Needs ``pip install datatrove orjson ./clients/python``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter

from inward_client import Inward, ItemError, Margin, StatusError

ROW = ("prompt", "chosen", "rejected")


class InwardMargins(PipelineStep):
    """Asks ``POST /margin`` for documents whose metadata hold a pair, many in a request.

    Args:
        drop_disagreeing: leave out pairs of which the service prefers the rejected answer.
    """

    name = "Inward margins"
    type = "ANNOTATOR"

    def __init__(self, url: str, *, head: str | None = None, batch: int = 64, drop_disagreeing: bool = False) -> None:
        super().__init__()
        self.url, self.head, self.batch, self.drop_disagreeing = url, head, batch, drop_disagreeing

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Documents with what the service says; ``INWARD_API_KEY`` is read by the client."""
        with Inward(self.url) as client:
            for documents in batches(data, self.batch):
                pairs = [{name: document.metadata.get(name) for name in ROW} for document in documents]
                with self.track_time(unit="batch"):
                    margins = self._margins(client, pairs)
                for document, margin in zip(documents, margins, strict=True):
                    document.metadata |= told(margin)
                    if self.drop_disagreeing and margin.label_agrees is False:
                        self.stat_update("dropped")
                    else:
                        self.stat_update("failed" if margin.error else "annotated")
                        yield document

    def _margins(self, client: Inward, pairs: list[dict[str, Any]]) -> Sequence[Margin]:
        try:
            return client.margin(pairs, head=self.head, truncate=True).margins
        except StatusError as error:  # of pairs of which none can be scored each has its reason
            if not error.each:
                raise
            return [Margin(error=ItemError(one.message)) for one in error.each]


def batches(data: DocumentsPipeline, size: int) -> Iterator[list[Document]]:
    """Up to ``size`` documents at a time."""
    documents = iter(data or ())
    while some := list(islice(documents, size)):
        yield some


def told(margin: Margin) -> dict[str, Any]:
    """What goes into a row."""
    if margin.error is not None:
        return {"error": margin.error.message}
    return {
        "margin": margin.margin, "margin_scaled": margin.margin_scaled, "label_agrees": margin.label_agrees,
        "label_probability": margin.label_probability,
    }  # fmt: skip


def as_document(_: Any, row: dict[str, Any], path: str, number: int | str) -> dict[str, Any]:
    """datatrove's documents have one text: the prompt; the whole row goes along as metadata."""
    return {"text": str(row["prompt"]) or " ", "id": row.pop("id", f"{path}/{number}"), "metadata": row}


def as_row(_: Any, document: Document) -> dict[str, Any]:
    """The row again, with what was added."""
    return {"id": document.id, **document.metadata}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the pipeline on this machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="folder of JSONL files")
    parser.add_argument("--out", required=True, help="folder of the results, one file for each task")
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--head", help="default: the first LEGEND head that is loaded")
    parser.add_argument("--tasks", type=int, default=1, help="parts that the files are shared out to")
    parser.add_argument("--workers", type=int, default=1, help="of them at once")
    parser.add_argument("--drop-disagreeing", action="store_true")
    args = parser.parse_args(argv)
    LocalPipelineExecutor(
        [
            JsonlReader(args.input, adapter=as_document),
            InwardMargins(args.url, head=args.head, drop_disagreeing=args.drop_disagreeing),
            JsonlWriter(args.out, output_filename="${rank}.jsonl", compression=None, adapter=as_row),
        ],
        tasks=args.tasks, workers=args.workers, logging_dir=f"{args.out}/logs",
    ).run()  # fmt: skip


if __name__ == "__main__":
    main()
