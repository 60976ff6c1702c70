"""What is to be read, and where it is to be written: everything that can be refused before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from inward.errors import DataError, SetupError
from inward.offline.annotate import fetch
from inward.offline.annotate.merge import Shape, Table, fresh, schema_for
from inward.offline.annotate.options import AnnotateOptions
from inward.offline.options import ADVICE
from inward.offline.places import check_file, check_page
from inward_client import rows
from inward_client.rows import LOOKED_AT, Format, PairReader, Row, Source, as_turns


@dataclass(frozen=True, slots=True)
class Plan:
    """What the options ask for, checked."""

    options: AnnotateOptions
    tables: tuple[Table, ...]
    counts: tuple[int, ...]
    """Rows of each table."""
    reader: PairReader
    characters: float
    """Of a row's texts, on average of the first ones."""
    notes: tuple[str, ...]
    """What the user should be told."""

    @property
    def sources(self) -> list[Source]:
        """What is read."""
        return [table.source for table in self.tables]


def plan(options: AnnotateOptions) -> Plan:
    """Looks at the input, and at the places that would be written to.

    Raises:
        SetupError: an option, or the output, can't be used.
        DataError: the input can't be read, or Parquet can't hold it.
    """
    sources = [replace(source, limit=options.limit) for source in inputs(options)]
    outs, format = outputs(options.output, sources)
    protect_input(options, sources, outs)
    firsts = _firsts(options, sources)
    reader = rows.recognise(firsts, options.columns, name=options.layout, parse_json=options.parse_json, advice=ADVICE)
    shape = Shape(reader, options.prefix, options.trl)
    if not options.replace_columns:
        _check_names(options.input, firsts, shape)
    if options.by is not None and not any(options.by in row for row in firsts):
        raise SetupError(f"--by {options.by}: {options.input} has no such column in its first {len(firsts)} rows")
    protect_outputs(options, outs)
    counts = tuple(source.count() for source in sources)
    if not any(counts):
        raise DataError(f"{options.input} has no rows")
    tables = tuple(
        Table(source, out, format, shape, schema_for(source, shape) if format == "parquet" else None)
        for source, out in zip(sources, outs, strict=True)
    )
    return Plan(options, tables, counts, reader, _characters(reader, firsts), tuple(_notes(reader, firsts, sources)))


def inputs(options: AnnotateOptions) -> list[Source]:
    """The tables that are read: of a path, of standard input, or of a hub's dataset.

    Raises:
        SetupError: there is nothing, or nobody to fetch it from.
        DataError: what is there is not known.
    """
    if options.from_stdin:
        return rows.find(fetch.spool(options.output))
    if fetch.is_hub_id(options.input):
        config, _, split = options.split.rpartition("/")
        return [fetch.from_hub(options.input.as_posix(), split, config or None)]
    return rows.find(options.input)


def beside(out: Path, ending: str) -> Path:
    """A file next to the output."""
    return out.with_name(out.name + ending)


def _firsts(options: AnnotateOptions, sources: Sequence[Source]) -> list[Row]:
    """Rows from which the layout is recognised."""
    found = [row for source in sources for row in islice(source.rows(), LOOKED_AT)]
    if firsts := [row for row in found if isinstance(row, dict)]:
        return firsts
    broken = next((row for row in found if isinstance(row, rows.DataError)), None)
    raise broken or rows.DataError(f"{options.input} has no rows")


def outputs(out: Path, sources: Sequence[Source]) -> tuple[list[Path], Format]:
    """A file for each source; for a folder Parquet, which keeps types and what was annotated."""
    if str(out) == "-" or (out.exists() and not out.is_dir() and not out.is_file()):
        raise SetupError(f"OUT can't be {out}, standard output or a device: name a file such as out.jsonl")
    if out.suffix and not out.is_dir():
        if len(sources) > 1:
            names = ", ".join(source.name for source in sources)
            raise SetupError(f"the input has {len(sources)} tables ({names}): OUT must be a folder, not {out}")
        if not out.parent.is_dir():
            raise SetupError(f"{out.parent} is not a folder")
        if (format := rows.format_of(out)) == "arrow":
            raise SetupError(f"{out}: write .parquet, which every reader of Arrow files also reads")
        return [out], format
    return [out / f"{source.name}.parquet" for source in sources], "parquet"


def protect_input(options: AnnotateOptions, sources: Sequence[Source], outs: Sequence[Path]) -> None:
    """Nothing that is written may be something that is read, by whatever name (links, too).

    Raises:
        SetupError: names both.
    """
    written = [*outs, *(beside(options.output, ending) for ending in (".rejected.jsonl", ".annotation.json"))]
    written += [path for path in (options.html, options.argilla) if path]
    written += [*map(fresh, written)]
    sources = [*sources] + ([] if options.apply is None else [replace(sources[0], paths=(options.apply,))])
    for read in (path for source in sources for path in source.paths):
        for path in written:
            if _is_same(read, path):
                raise SetupError(f"{path} is {read}, which is read: name another OUT, an input is never written to")
    folder = options.input.resolve()
    if folder.is_dir() and any(out.resolve().is_relative_to(folder) for out in outs):
        raise SetupError(f"{options.output} lies in {options.input}, which is read: name an OUT elsewhere")


def protect_outputs(options: AnnotateOptions, outs: Sequence[Path]) -> None:
    """Nothing is overwritten unless that is asked for, and what is written beside OUT has a folder.

    Raises:
        SetupError: names what is there, or what is not.
    """
    besides = [path for path in (options.html, options.argilla) if path is not None]
    for path in besides:
        if not path.parent.is_dir():
            raise SetupError(f"{path.parent} is not a folder")
    tables = [path for path in (*outs, options.argilla) if path is not None]
    for path in tables:
        check_file(path, "file of rows")
    if there := [str(path) for path in tables if path.exists() and not options.restart]:
        raise SetupError(f"{', '.join(there)} is there already: --restart overwrites it")
    if options.html is not None:
        check_page(options.html)
    written = [path.resolve() for path in (*outs, *besides)]
    if twice := [str(path) for path in written if written.count(path) > 1]:
        raise SetupError(f"{twice[0]} is named twice: OUT, --html and --argilla are files of their own")


def _is_same(read: Path, written: Path) -> bool:
    return read.resolve() == written.resolve() or (written.exists() and read.samefile(written))


def _check_names(path: Path, firsts: Sequence[Row], shape: Shape) -> None:
    if taken := sorted({name for row in firsts for name in row} & set(shape.names())):
        raise SetupError(
            f"{path} has the columns {', '.join(taken)} already: --replace-columns overwrites them, "
            "--prefix NAME_ keeps them"
        )


def _characters(reader: PairReader, firsts: Sequence[Row]) -> float:
    lengths = []
    for row in firsts:
        try:
            pair = reader.pair(row)
        except rows.DataError:
            continue
        texts = [turn["content"] for turn in as_turns(pair.prompt)] + [pair.chosen, pair.rejected]
        lengths.append(sum(map(len, texts)))
    return sum(lengths) / len(lengths) if lengths else 0.0


def _notes(reader: PairReader, firsts: Sequence[Row], sources: Sequence[Source]) -> Iterator[str]:
    yield from reader.notes(firsts)
    if len(sources) > 1:
        yield f"read are {len(sources)} tables: {', '.join(source.name for source in sources)}"
