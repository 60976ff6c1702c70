"""What ``inward annotate`` does: chunks through a scorer, here or in Ray's actors, then everything put together."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from inward import __version__
from inward.offline.annotate import argilla, merge
from inward.offline.annotate.clusters import MOST_PAIRS, Cluster, cluster
from inward.offline.annotate.corrected import correct
from inward.offline.annotate.options import AnnotateOptions
from inward.offline.annotate.page import page
from inward.offline.annotate.plan import Plan, beside, plan
from inward.offline.annotate.quality import Quality, Survey
from inward.offline.annotate.scorer import Annotated, Annotator, OpenScorer, Scorer
from inward.offline.annotate.summary import Picked, Summary, Wanted, pick, shown, summarise
from inward.offline.annotate.work import Chunk, Cursor, Done, Progress, chunk_rows, chunks, do, identity
from inward.offline.data import data_errors
from inward_client.rows import Row, Source, printable

AT_ONCE_AT_URL = 4
"""Chunks in flight to a service. In this process one: what shares a pass with what does not depend on the moment
then, so the same file gives the same bytes, also after an interruption."""
INTERRUPTED = 130
"""Exit status."""
Keep = Callable[[Chunk, Done], None]
Results = Callable[[Source], Iterable[Annotated]]
"""What became of each row of a source."""


@data_errors()
def annotate(options: AnnotateOptions, opened: OpenScorer) -> int:
    """The whole command; see ``inward annotate --help``. The exit status.

    Raises:
        SetupError: names the option or the file, and what to do.
    """
    if options.apply is not None:
        correct(options)
        return 0
    planned = plan(options)
    for note in planned.notes:
        print(f"note: {printable(note)}", file=sys.stderr)
    job = Annotation(planned, opened)
    try:
        if options.engine == "ray":
            job.in_ray()
        else:
            asyncio.run(job.here())
    except KeyboardInterrupt:
        print(f"\nstopped: {job.kept:,} rows kept; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    return 0 if job.annotated else 1


@dataclass(frozen=True, slots=True)
class Findings:
    """What is told of a job in the end."""

    summary: Summary
    quality: Quality
    clusters: Sequence[Cluster] | None
    """None where nobody asked for them."""

    def to_json(self) -> dict[str, Any]:
        """For ``--json`` and the metadata."""
        told = self.summary.to_json() | {"quality": self.quality.to_json()}
        return told if self.clusters is None else told | {"clusters": [one.to_json() for one in self.clusters]}

    def text(self) -> str:
        """For the terminal."""
        lines = [self.summary.text(self.quality)]
        if self.clusters:
            lines += ["", "clusters", *(line for one in self.clusters for line in one.text())]
        return "\n".join(map(printable, lines))


class Annotation:
    """One run of the command."""

    def __init__(self, planned: Plan, opened: OpenScorer) -> None:
        self._plan, self._options, self._opened = planned, planned.options, opened
        self.kept = self.annotated = 0
        """Rows that an interruption does not harm; rows that have scores in the end."""

    async def here(self) -> None:
        """Through one scorer."""
        async with self._opened() as scorer:
            annotator = await scorer.annotator()
            at_once = self._options.at_once or (1 if self._options.url is None else AT_ONCE_AT_URL)
            with self._progress(annotator, scorer.tokens) as progress:
                with self._bar(progress) as bar:
                    await self._work(scorer, self._todo(progress), at_once, self._keep(progress, bar))
                await self._finish(annotator, progress, scorer)

    def in_ray(self) -> None:
        """Through the actors of a cluster."""
        from inward.offline.annotate.ray import AnnotateCluster

        options = self._options
        with AnnotateCluster(
            self._opened, self._plan.sources, self._plan.reader, actors=options.actors, gpus=options.gpus
        ) as cluster:
            annotator, tokens = cluster.annotator()
            with self._progress(annotator, tokens) as progress:
                with self._bar(progress) as bar:
                    cluster.work(self._todo(progress), self._keep(progress, bar))
                asyncio.run(self._finish(annotator, progress, None))

    def _progress(self, annotator: Annotator, tokens: int | None) -> Progress:
        rows = chunk_rows(tokens, self._plan.characters)
        self._chunks = chunks(self._plan.counts, rows)
        options = self._options
        asked = (options.truncate, options.head, options.limit)
        progress = Progress(
            options.output,
            identity(self._plan.sources, self._plan.reader, asked, annotator, rows),
            restart=options.restart,
        )
        self.kept = progress.rows
        return progress

    def _todo(self, progress: Progress) -> list[Chunk]:
        return [chunk for chunk in self._chunks if not progress.done(chunk)]

    def _bar(self, progress: Progress) -> tqdm[None]:
        return tqdm(
            total=sum(self._plan.counts), initial=progress.rows, unit=" pairs", desc="annotate", file=sys.stderr,
            smoothing=0.05,
        )  # fmt: skip

    def _keep(self, progress: Progress, bar: tqdm[None]) -> Keep:
        tokens, began = 0, time.monotonic()

        def keep(chunk: Chunk, done: Done) -> None:
            nonlocal tokens
            progress.keep(chunk, done)
            self.kept = progress.rows
            tokens += sum(row.tokens for row in done.rows)
            if tokens:
                bar.set_postfix_str(f"{tokens / max(time.monotonic() - began, 1e-9):,.0f} tokens/s", refresh=False)
            bar.update(chunk.rows)

        return keep

    async def _work(self, scorer: Scorer, todo: Sequence[Chunk], at_once: int, keep: Keep) -> None:
        """Some chunks at a time, so that the model finds the next one waiting."""
        cursor, waiting = Cursor(self._plan.sources), iter(todo)

        async def worker() -> None:
            for chunk in waiting:  # whoever is free takes the next
                keep(chunk, await do(scorer, self._plan.reader, cursor.read(chunk)))

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(at_once):
                    group.create_task(worker())
        except* Exception as errors:
            raise errors.exceptions[0] from None

    async def _finish(self, annotator: Annotator, progress: Progress, scorer: Scorer | None) -> None:
        """Writes everything, forgets the progress, and says what was found."""
        options, sources, reader = self._options, self._plan.sources, self._plan.reader

        def results(source: Source) -> Iterable[Annotated]:
            own = [chunk for chunk in self._chunks if sources[chunk.source] is source]
            return progress.results(own)

        versions = {json.dumps(by, sort_keys=True) for chunk in self._chunks if (by := progress.read(chunk).by)}
        metadata = self._metadata(annotator, [json.loads(version) for version in sorted(versions)])
        with merge.together() as new:  # what stops this leaves no OUT, so that the same command goes on
            found = await self._write(new, results, annotator, metadata, scorer)
            suspicious = pick(sources, results, reader, options.suspicious)
        progress.remove()
        if options.from_stdin:
            sources[0].paths[0].unlink(missing_ok=True)
        self.annotated = found.summary.annotated
        self._tell(found, suspicious, len(versions))

    async def _write(
        self, new: Callable[[Path], Path], results: Results, annotator: Annotator, metadata: Row, scorer: Scorer | None
    ) -> Findings:
        options, sources, reader = self._options, self._plan.sources, self._plan.reader
        summary = summarise(row for source in sources for row in results(source))
        wanted = Wanted(options.only_flipped, options.drop_below)
        for table in self._plan.tables:
            out = new(table.out)
            merge.write(table, out, lambda table=table: map(wanted.or_left_out, results(table.source)), metadata)  # type: ignore[misc]
        merge.write_rejected(sources, results, new(beside(options.output, ".rejected.jsonl")))
        survey = Survey(reader, options.by)
        for source in sources:
            survey.add(merge.good(source, results(source)))
        quality = survey.quality(annotator.held_out)
        clusters = await self._clusters(results, scorer, annotator) if options.clusters and scorer else None
        found = Findings(summary, quality, clusters)
        about = json.dumps(metadata | {"summary": found.to_json()}, indent=2)
        new(beside(options.output, ".annotation.json")).write_text(about + "\n", encoding="utf-8")
        if options.html:
            pairs = pick(sources, results, reader, options.page_rows, options.page_of)
            tokens = await scorer.token_scores([one.pair for one in pairs]) if options.token_scores and scorer else ()
            shown = page(options.input.name, annotator, summary, pairs, quality, tokens)
            new(options.html).write_text(shown, encoding="utf-8")
        if options.argilla:
            numbered = ((source.name, merge.numbered(source, results(source))) for source in sources)
            argilla.write(new(options.argilla), numbered, reader, annotator.head["name"])
        return found

    async def _clusters(self, results: Results, scorer: Scorer, annotator: Annotator) -> list[Cluster]:
        """Of a sample of the pairs, whose states are read once more."""
        sample = pick(self._plan.sources, results, self._plan.reader, MOST_PAIRS, "sample")
        pairs = [one for one in sample if one.columns["label_agrees"] is not None]
        judges = annotator.held_out is None or annotator.held_out.better_than_chance
        states_ND = await scorer.states([one.pair for one in pairs]) if pairs else np.empty((0, 1), dtype=np.float32)
        return cluster(pairs, states_ND, self._options.clusters, judges=judges)

    def _tell(self, found: Findings, pairs: Sequence[Picked], versions: int) -> None:
        options = self._options
        print(json.dumps(found.to_json(), indent=2) if options.json else found.text())
        for one in pairs:
            print("\n" + printable(shown(one)))
        if options.drop_below is not None and (unrated := found.summary.unrated):
            known = f"{unrated:,} of {found.summary.annotated:,} rows have no label_probability"
            print(f"note: {known}: --drop-below drops none of them", file=sys.stderr)
        if versions > 1:
            print(
                "\nThe head or the policy was switched meanwhile: the rows are of several versions (see the metadata).",
                file=sys.stderr,
            )
        if not options.json:
            outs = ", ".join(str(table.out) for table in self._plan.tables)
            left_out = f"; left out: {beside(options.output, '.rejected.jsonl')}" if found.summary.rejected else ""
            print(f"\n{outs}{left_out}")

    def _metadata(self, annotator: Annotator, versions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {
            **asdict(annotator),
            "versions": versions,
            "layout": self._plan.reader.layout.name,
            "truncate": self._options.truncate,
            "margin": "bin" if self._options.trl else "raw",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "annotate": __version__,
        }
