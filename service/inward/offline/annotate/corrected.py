"""``inward annotate --apply``: the input with what was decided about its labels. No model is loaded."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from inward.errors import DataError, SetupError
from inward.offline.annotate import decisions, parquet
from inward.offline.annotate.cells import to_csv, to_json
from inward.offline.annotate.decisions import Applied, Decided
from inward.offline.annotate.merge import text_file
from inward.offline.annotate.options import AnnotateOptions
from inward.offline.annotate.plan import inputs, outputs, protect_input
from inward_client import rows
from inward_client.rows import LOOKED_AT, Format, PairReader, Row, Source, printable


def correct(options: AnnotateOptions) -> None:
    """Writes the corrected set and says what was done.

    Raises:
        SetupError: an option, or the output, can't be used.
        DataError: the input or the decisions can't be read, or some decisions are of pairs that are not there; nothing
            is written then.
    """
    assert options.apply is not None
    decided = decisions.read(options.apply)
    sources = inputs(options)
    outs, format = outputs(options.output, sources)
    protect_input(options, sources, outs)
    if there := [str(out) for out in outs if out.exists() and not options.restart]:
        raise SetupError(f"{', '.join(there)} is there already: --restart overwrites it")
    firsts = [row for source in sources for row in islice(source.rows(), LOOKED_AT) if isinstance(row, dict)]
    reader = rows.recognise(firsts, options.columns, name=options.layout, parse_json=options.parse_json)
    told, fresh = Applied(), [out.with_name(f".{out.name}.new") for out in outs]
    try:
        for source, path in zip(sources, fresh, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(source, reader, decided, options.prefix, format, path, told)
        if missing := len(decided.by_key.keys() - told.found):
            raise DataError(
                f"{missing} of {len(decided)} decisions are of pairs that {options.input} does not have: give the file "
                "that they were made on; nothing was written"
            )
        for path, out in zip(fresh, outs, strict=True):
            path.replace(out)
    finally:
        for path in [*fresh, *(sources[0].paths if options.from_stdin else ())]:
            path.unlink(missing_ok=True)
    print(printable(told.text(decided)), file=sys.stderr)
    print(", ".join(map(str, outs)))


def _write(
    source: Source, reader: PairReader, decided: Decided, prefix: str, format: Format, path: Path, told: Applied
) -> None:
    def kept(counted: Applied) -> Iterator[Row]:
        return decisions.apply(source.rows(), reader, decided, prefix, counted)

    if format == "parquet":
        schema = source.schema() if source.columnar else parquet.schema_of_rows(lambda: kept(Applied()), (), "")
        parquet.write_rows(kept(told), schema, path, {"decisions": len(decided)})
        return
    with text_file(path, path.name.endswith(".gz.new")) as file:
        if format not in ("csv", "tsv"):
            file.writelines(to_json(row) + "\n" for row in kept(told))
            return
        delimiter = "\t" if format == "tsv" else ","
        writer = csv.DictWriter(file, _names(kept(Applied())), delimiter=delimiter)
        writer.writeheader()
        writer.writerows({name: to_csv(value) for name, value in row.items()} for row in kept(told))


def _names(some: Iterator[Mapping[str, object]]) -> Sequence[str]:
    return [*dict.fromkeys(name for row in some for name in row)]
