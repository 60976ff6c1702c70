"""Bulk jobs: a file of rows is taken at once, worked off behind everybody's requests, and fetched when it is done."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from starlette.responses import StreamingResponse

from inward.api.answers import plain
from inward.api.auth import CALLER
from inward.api.errors import only, told
from inward.api.rows import KINDS, RowsKind
from inward.api.services import BulkJobs, FromApp, Services
from inward.errors import Conflict, InvalidField, NotFound, RequestError, TooLarge
from inward.wire.admin import JobStatus

JSONL = ("application/x-ndjson", "application/jsonl", "application/json-lines")
Id = Annotated[str, Path(pattern="^[0-9a-f]{32}$", description="As `POST /jobs` gave it.")]
Name = Annotated[str | None, Query(pattern="^[A-Za-z0-9._-]{1,64}$")]
ROWS: dict[str, Any] = {JSONL[0]: {"schema": {"type": "string", "description": "JSON Lines."}}}

router = APIRouter(tags=["bulk"], responses=only(401, 404, 422, 503))


@router.post(
    "/jobs",
    status_code=201,
    response_model=JobStatus,
    summary="Upload rows to be scored in their own time",
    responses=only(400, 413, 415),
    openapi_extra={"requestBody": {"required": True, "content": ROWS}},
)
async def create(
    request: Request,
    services: FromApp,
    kind: RowsKind,
    head: Name = None,
    append_to: Name = None,
) -> Response:
    """The body is JSONL: one pair or item a line, as the route named by `kind` takes them.

    `append_to` names a stream in Redis to which scored rows are appended as well, for trainers that consume them as
    they come.
    """
    jobs = _jobs(services)
    if "scores" in request.query_params:
        raise InvalidField("scores is called `append_to`", param="scores")
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type not in JSONL:
        raise RequestError(f'send JSONL with the header "content-type: {JSONL[0]}"', param="content-type")
    chosen = services.heads.resolve(head, KINDS[kind])
    lines = _lines(request.stream(), services.limits.body_bytes)
    caller = CALLER.get()
    made = await jobs.create(
        kind, lines, head=chosen.name, scores=append_to, caller=None if caller is None else caller.name
    )
    return plain(made.body(), status=201)


@router.get("/jobs/{id}", response_model=JobStatus, summary="How far a job is")
async def show(id: Id, services: FromApp) -> Response:
    """`state` is `running`, `done` or `cancelled`; `done` counts rows."""
    return plain((await _jobs(services).get(id)).body())


@router.get(
    "/jobs/{id}/results",
    response_class=Response,
    summary="The results of a job that is done",
    responses={200: {"content": ROWS}, **told({409: "It is not done yet, or was cancelled."})},
)
async def results(id: Id, services: FromApp) -> Response:
    """JSONL in the order of the rows; a row that could not be scored has an `error`."""
    jobs = _jobs(services)
    job = await jobs.get(id)
    if job.state != "done":
        raise Conflict(f"job {id} is {job.state}: {job.body()['done']} of {job.body()['rows']} rows are done")
    return StreamingResponse(jobs.results(id), media_type=JSONL[0])


@router.post("/jobs/{id}/cancel", response_model=JobStatus, summary="Stop a job and drop what it did")
async def cancel(id: Id, services: FromApp) -> Response:
    """A job that is done stays as it is."""
    return plain((await _jobs(services).cancel(id)).body())


async def _lines(stream: AsyncIterator[bytes], longest: int) -> AsyncIterator[str]:
    """The lines of a body as they come, without empty ones.

    Raises:
        RequestError: a line is not UTF-8.
        TooLarge: a line has more than ``longest`` bytes.
    """
    begun, number = bytearray(), 1  # a line that is not ended yet; each byte of it is looked at once
    async for data in stream:
        first, *more = data.split(b"\n")
        begun += first
        if len(begun) > longest:
            raise TooLarge(f"line {number} of the body is larger than {longest} bytes")
        if not more:
            continue
        *whole, last = more
        for line in (bytes(begun), *whole):
            if text := _text(line, number):
                yield text
            number += 1
        begun = bytearray(last)
    if text := _text(bytes(begun), number):
        yield text


def _text(line: bytes, number: int) -> str:
    try:
        return line.decode().strip()
    except UnicodeDecodeError as error:
        raise RequestError(f"line {number} of the body is not UTF-8 at its byte {error.start}") from None


def _jobs(services: Services) -> BulkJobs:
    if services.jobs is None:
        raise NotFound("bulk jobs need a Redis that keeps them: run `inward api` and `inward worker` around one")
    return services.jobs
