"""What ``inward annotate`` does: chunks through a service in this process, at a URL or in Ray's actors, then
everything put together.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import httpx
from tqdm import tqdm

from inward import __version__, logs
from inward import files as durable
from inward.commands.options import settings_of
from inward.errors import DataError, SetupError
from inward.offline.annotate import merge
from inward.offline.annotate.asking import Annotated, Annotator, MarginClient
from inward.offline.annotate.merge import Shape
from inward.offline.annotate.page import page
from inward.offline.annotate.summary import shown, summarise, suspicious
from inward.offline.annotate.work import CHUNK, Done, Progress, Task, identity
from inward.offline.data import files
from inward.offline.data.files import Chunk, Cursor, Format, Source
from inward.offline.data.layouts import LAYOUTS, Layout, recognise
from inward.settings import Settings

LOOKED_AT = 100
"""Rows of each table from which the layout is recognised."""
ON_PAGE = 200
"""Pairs on the page."""
AT_ONCE = 4
"""Chunks in flight to a service. In this process one: what shares a pass with what does not depend on the moment
then, so the same file gives the same bytes, also after an interruption."""
NO_LIMIT = 1e6
"""Seconds. In this process nobody is kept waiting by a long request."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the rows are scored: at a URL, or (None) by a model that is loaded for it."""

    settings: Settings
    url: str | None = None
    key: str | None = None

    @asynccontextmanager
    async def asker(self, task: Task) -> AsyncIterator[MarginClient]:
        """Opens it.

        Raises:
            SetupError: the model or its heads can't be loaded.
        """
        if self.url is not None:
            headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
            async with httpx.AsyncClient(
                base_url=self.url, headers=headers, timeout=httpx.Timeout(None, connect=10.0)
            ) as client:
                yield MarginClient(client, head=task.head, truncate=task.truncate)
            return
        from inward.processes.standalone import Standalone

        own = {
            "timeout": NO_LIMIT,
            "api_keys": frozenset(),
            "max_body_bytes": 2**30,
            "queue_tokens": 10**9,
            "sharing_window": 0.0,
        }
        house = await Standalone.open(self.settings.model_copy(update=own))
        try:
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(app=house.app), base_url="http://inward", timeout=None
            ) as client:
                yield MarginClient(client, head=task.head, truncate=task.truncate)
        finally:
            await house.close(timeout=5.0)


@dataclass(frozen=True, slots=True)
class Job:
    """What the command line asks for, checked."""

    sources: list[Source]
    outs: list[Path]
    format: Format
    task: Task
    shape: Shape
    chunks: list[Chunk]

    def of(self, source: Source) -> list[Chunk]:
        """The chunks of one source."""
        return [chunk for chunk in self.chunks if self.sources[chunk.source] is source]


def annotate(args: argparse.Namespace, *, key: str | None) -> int:
    """The whole command; see ``inward annotate --help``.

    Raises:
        SetupError: names the option or the file, and what to do.
    """
    logs.configure("error", json=False)
    job = _job(args)
    place = Place(settings_of(args), args.url, key)
    return asyncio.run(_locally(args, job, place)) if args.engine == "local" else _in_ray(args, job, place)


async def _locally(args: argparse.Namespace, job: Job, place: Place) -> int:
    async with place.asker(job.task) as asker:
        annotator = await asker.annotator()
        with _progress(args, job, annotator) as progress:
            todo = [chunk for chunk in job.chunks if not progress.done(chunk)]
            with _bar(job, todo) as bar:
                await _work(
                    asker, job, todo, args.at_once or (1 if place.url is None else AT_ONCE), _keep(progress, bar)
                )
            return _finish(args, job, annotator, progress)


def _in_ray(args: argparse.Namespace, job: Job, place: Place) -> int:
    from inward.offline.annotate.ray import Cluster

    with Cluster(place, job, actors=args.actors, gpus=args.gpus) as cluster:
        annotator = cluster.annotator()
        with _progress(args, job, annotator) as progress:
            todo = [chunk for chunk in job.chunks if not progress.done(chunk)]
            with _bar(job, todo) as bar:
                cluster.work(todo, _keep(progress, bar))
            return _finish(args, job, annotator, progress)


async def _work(
    asker: MarginClient, job: Job, todo: Sequence[Chunk], at_once: int, keep: Callable[[Chunk, Done], None]
) -> None:
    """Some chunks at a time, so that the model finds the next one waiting."""
    cursor, waiting = Cursor(job.sources), iter(todo)

    async def worker() -> None:
        for chunk in waiting:  # whoever is free takes the next
            keep(chunk, await job.task.do(asker, cursor.read(chunk)))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(worker())
    except* SetupError as errors:
        raise errors.exceptions[0] from None
    except* OSError as errors:
        raise errors.exceptions[0] from None


def _job(args: argparse.Namespace) -> Job:
    sources = [replace(source, limit=args.limit) for source in files.find(args.input)]
    outs, format = _outs(args.output, sources)
    rename = _columns(args.columns)
    firsts = [row for source in sources for row in islice(source.rows(), LOOKED_AT) if not isinstance(row, DataError)]
    if args.layout != "auto" and args.layout not in LAYOUTS:
        raise SetupError(f"--layout {args.layout}: auto, {', '.join(LAYOUTS)}")
    layout: Layout = recognise(firsts, rename) if args.layout == "auto" else LAYOUTS[args.layout]
    shape = Shape(layout, rename, args.prefix, args.trl)
    taken = sorted({name for row in firsts for name in row} & set(shape.names()))
    if taken and not args.replace_columns:
        raise SetupError(
            f"{args.input} has the columns {', '.join(taken)} already: --replace-columns overwrites them, --prefix NAME_ keeps them"
        )
    if there := [str(out) for out in outs if out.exists() and not args.restart]:
        raise SetupError(f"{', '.join(there)} is there already: --restart overwrites it")
    chunks = files.chunks([source.count() for source in sources], CHUNK)
    if not chunks:
        raise DataError(f"{args.input} has no rows")
    return Job(sources, outs, format, Task(layout, rename, args.truncate, args.head), shape, chunks)


def _outs(out: Path, sources: Sequence[Source]) -> tuple[list[Path], Format]:
    """A file for each source; for a folder Parquet, which keeps types and what was annotated."""
    if out.suffix:
        if len(sources) > 1:
            raise SetupError(
                f"the input has {len(sources)} tables ({', '.join(s.name for s in sources)}): OUT must be a folder, not {out}"
            )
        if not out.parent.is_dir():
            raise SetupError(f"{out.parent} is not a folder")
        if (format := files.format_of(out)) == "arrow":
            raise SetupError(f"{out}: write .parquet, which every reader of Arrow files also reads")
        return [out], format
    out.mkdir(parents=True, exist_ok=True)
    return [out / f"{source.name}.parquet" for source in sources], "parquet"


def _columns(text: str) -> dict[str, str]:
    known = set().union(*(layout.columns for layout in LAYOUTS.values()))
    renamed = {ours: theirs for ours, _, theirs in (part.partition("=") for part in text.split(",") if part)}
    for ours, theirs in renamed.items():
        if ours not in known or not theirs:
            raise SetupError(
                f"--columns {ours}={theirs}: write OURS=THEIRS,… where OURS is one of {', '.join(sorted(known))}"
            )
    return renamed


def _progress(args: argparse.Namespace, job: Job, annotator: Annotator) -> Progress:
    return Progress(args.output, identity(job.sources, job.task, annotator, CHUNK, args.limit), restart=args.restart)


def _bar(job: Job, todo: Sequence[Chunk]) -> tqdm[None]:
    rows, left = (sum(chunk.rows for chunk in chunks) for chunks in (job.chunks, todo))
    return tqdm(total=rows, initial=rows - left, unit=" pairs", desc="annotate", file=sys.stderr, smoothing=0.05)


def _keep(progress: Progress, bar: tqdm[None]) -> Callable[[Chunk, Done], None]:
    def keep(chunk: Chunk, done: Done) -> None:
        progress.keep(chunk, done)
        bar.update(chunk.rows)

    return keep


def _finish(args: argparse.Namespace, job: Job, annotator: Annotator, progress: Progress) -> int:
    """Writes everything, says what was found, and forgets the progress."""

    def results(source: Source) -> Iterable[Annotated]:
        return progress.results(job.of(source))

    versions = {json.dumps(by, sort_keys=True) for chunk in job.chunks if (by := progress.read(chunk).by)}
    metadata = _metadata(job, annotator, [json.loads(version) for version in sorted(versions)])
    for source, out in zip(job.sources, job.outs, strict=True):
        merge.write(source, lambda source=source: results(source), out, job.format, job.shape, metadata)  # type: ignore[misc]
    rejected = _beside(args.output, ".rejected.jsonl")
    merge.write_rejected(job.sources, results, rejected)
    summary = summarise(row for source in job.sources for row in results(source))
    durable.write(
        _beside(args.output, ".annotation.json"),
        json.dumps(metadata | {"summary": summary.to_json()}, indent=2).encode() + b"\n",
    )
    most = max(args.suspicious, ON_PAGE if args.html else 0)
    pairs = (
        suspicious(job.sources, {s.name: results(s) for s in job.sources}, job.task.layout, job.task.rename, most)
        if most
        else []
    )
    if args.html:
        args.html.write_text(page(args.input.name, annotator, summary, pairs[:ON_PAGE]), encoding="utf-8")
    print(json.dumps(summary.to_json(), indent=2) if args.json else summary.text())
    for one in pairs[: args.suspicious]:
        print("\n" + shown(one))
    if len(versions) > 1:
        print(
            "\nThe head or the policy was switched meanwhile: the rows are of several versions (see the metadata).",
            file=sys.stderr,
        )
    if not args.json:
        print(f"\n{', '.join(map(str, job.outs))}" + (f"; left out: {rejected}" if summary.rejected else ""))
    progress.remove()
    return 0 if summary.annotated else 1


def _metadata(job: Job, annotator: Annotator, versions: Sequence[Mapping[str, object]]) -> dict[str, object]:
    return {
        **asdict(annotator),
        "versions": versions,
        "layout": job.task.layout.name,
        "truncate": job.task.truncate,
        "margin": "bin" if job.shape.trl else "raw",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "annotate": __version__,
    }


def _beside(out: Path, ending: str) -> Path:
    return out.with_name(out.name + ending)
