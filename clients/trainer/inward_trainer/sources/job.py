"""Pairs scored by a bulk job of the service."""

from __future__ import annotations

import json
import logging
import uuid
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from inward_trainer.durable import write_text
from inward_trainer.errors import DataError, ServiceError
from inward_trainer.pairs import ScoredPair, digest, read_row
from inward_trainer.service import Service
from inward_trainer.sources.file import read_table
from inward_trainer.stopping import Stopping

LOG = logging.getLogger(__name__)
POLL_S = 1.0
"""Between two looks at a job."""
TOLD_POLLS = 10
"""Looks between two lines in the log."""


def pairs_of_job(
    service: Service,
    path: Path,
    folder: Path,
    *,
    id: str | None = None,
    head: str | None = None,
    begun: bool = False,
    stopping: Stopping | None = None,
) -> list[ScoredPair]:
    """The pairs of ``path`` with what the job says of them; those that could not be scored are left out.

    Args:
        path: the rows that were uploaded, JSONL or Parquet.
        folder: where the id of the job and its results are kept, so that a trainer that starts again asks for nothing
            twice.
        id: of the job; None uploads the rows as a new one.
        begun: whether pairs of the folder's job were used already, so that it can't be another one any more.
        stopping: ends the wait.

    Raises:
        DataError: the results are not those of these rows, or the job is another one than the run began with.
        ServiceError: the job was cancelled, or there is no such job.
    """
    rows = read_table(path)
    pairs = [read_row(row, str(i)) for i, row in enumerate(rows)]
    results = folder / "job-results.jsonl"
    _check(folder, path, _Asked(digest(pairs), id, head), begun)
    if not results.is_file():
        id = id or _uploaded(service, pairs, folder, head)
        _wait(service, id, stopping or Stopping())
        write_text(results, "".join(json.dumps(result) + "\n" for result in service.job_results(id)))
    scored = {result["index"]: result for result in map(json.loads, results.read_text("utf-8").splitlines())}
    if scored.keys() != set(range(len(rows))):
        raise DataError(
            f"the job has results of {len(scored)} rows, and {path} has {len(rows)}: give the file that was uploaded"
        )
    lost = [str(i) for i, result in sorted(scored.items()) if result.get("error")]
    if lost:
        LOG.warning("%d rows can't be scored and are left out: %s", len(lost), ", ".join(lost))
    return [
        replace(read_row({**rows[i], **result}, str(i)), policy_version=result["policy_version"])
        for i, result in sorted(scored.items())
        if not result.get("error")
    ]


class _Asked(NamedTuple):
    """What the results of a folder are of."""

    rows: str
    job: str | None
    head: str | None


def _check(folder: Path, path: Path, now: _Asked, begun: bool) -> None:
    """Writes down what the folder's results are of; what it has of something else, of which nothing was used, is
    dropped.

    Raises:
        DataError: some of it was used.
    """
    asked, given, note = folder / "job-rows", folder / "job-given", folder / "job"
    before = _read(given)
    rows = asked.read_text("utf-8") if asked.is_file() else now.rows
    job = before.get("job") or (note.read_text("utf-8") if note.is_file() else None)
    head = before.get("head", now.head)
    if begun:
        if rows != now.rows:
            raise DataError(f"{path} has other rows than this run began with: give that file, or another --out")
        if now.job and job and now.job != job:
            raise DataError(f"--job {now.job}: this run began with job {job}: give that one, or another --out")
        if head != now.head:
            raise DataError(
                f"--head {now.head or '(the default)'}: this run began with {head or 'the default'}: give that one, or "
                "another --out"
            )
        return
    if (rows, before.get("job"), head) != (now.rows, now.job, now.head):
        for name in ("job", "job-key", "job-results.jsonl"):
            (folder / name).unlink(missing_ok=True)
    write_text(asked, now.rows)
    write_text(given, json.dumps({"job": now.job, "head": now.head}))


def _read(given: Path) -> dict[str, str | None]:
    text = given.read_text("utf-8") if given.is_file() else ""
    return dict(json.loads(text)) if text.startswith("{") else {"job": text or None}  # a former version's is the id


def _uploaded(service: Service, pairs: list[ScoredPair], folder: Path, head: str | None) -> str:
    """Id of the job of these pairs, which is made once: the key is written down before, and the id after."""
    note, key = folder / "job", folder / "job-key"
    if note.is_file():
        return note.read_text("utf-8")
    if not key.is_file():
        write_text(key, uuid.uuid4().hex)
    id = service.create_job(pairs, key.read_text("utf-8"), head)
    write_text(note, id)
    return id


def _wait(service: Service, id: str, stopping: Stopping) -> None:
    looks = 0
    while (job := service.job(id)).state == "running":
        looks += 1
        if looks % TOLD_POLLS == 0:
            LOG.info("bulk job %s: %d of %d rows are scored", id, job.done, job.rows)
        stopping.sleep(POLL_S)
    if job.state != "done":
        raise ServiceError(f"bulk job {id} is {job.state}")
