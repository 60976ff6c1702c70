"""Pairs scored by a bulk job of the service."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

from inward_trainer.durable import write_text
from inward_trainer.errors import DataError, ServiceError
from inward_trainer.pairs import ScoredPair, read_row
from inward_trainer.service import Service
from inward_trainer.sources.rows import read_table

POLL = 1.0
"""Seconds between two looks at a job."""


def pairs_of_job(
    service: Service, path: Path, folder: Path, *, id: str | None = None, head: str | None = None
) -> list[ScoredPair]:
    """The pairs of ``path`` with what the job says of them; those that could not be scored are left out.

    Args:
        path: the rows that were uploaded, JSONL or Parquet.
        folder: where the id of the job and its results are kept, so that a trainer that starts again asks for nothing
            twice.
        id: of the job; None uploads the rows as a new one.

    Raises:
        DataError: the results are not those of these rows.
        ServiceError: the job was cancelled, or there is no such job.
    """
    rows = read_table(path)
    results = folder / "job-results.jsonl"
    if not results.is_file():
        write_text(results, _fetched(service, rows, folder / "job", id, head))
    scored = {result["index"]: result for result in map(json.loads, results.read_text("utf-8").splitlines())}
    if scored.keys() != set(range(len(rows))):
        raise DataError(
            f"the job has results of {len(scored)} rows, and {path} has {len(rows)}: give the file that was uploaded"
        )
    return [
        replace(read_row({**rows[i], **result}, str(i)), policy_version=result["policy_version"])
        for i, result in sorted(scored.items())
        if not result.get("error")
    ]


def _fetched(service: Service, rows: list[dict[str, object]], note: Path, id: str | None, head: str | None) -> str:
    if id is None and note.is_file():
        id = note.read_text("utf-8")
    if id is None:
        texts = "\n".join(json.dumps(read_row(row, str(i)).texts()) for i, row in enumerate(rows))
        id = service.create_job(texts.encode(), head)
        write_text(note, id)
    while (state := service.job(id)["state"]) == "running":
        time.sleep(POLL)
    if state != "done":
        raise ServiceError(f"bulk job {id} is {state}")
    return service.job_results(id)
