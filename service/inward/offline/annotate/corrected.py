"""``inward annotate --apply``: the input with what was decided about its labels. No model is loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from inward.errors import DataError
from inward.offline.annotate import decisions, parquet
from inward.offline.annotate.decisions import Applied, Decided
from inward.offline.annotate.merge import column_names, together, write_text
from inward.offline.annotate.options import AnnotateOptions
from inward.offline.annotate.plan import inputs, outputs, protect_input, protect_outputs
from inward.offline.options import ADVICE
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
    protect_outputs(options, outs)
    firsts = [row for source in sources for row in islice(source.rows(), LOOKED_AT) if isinstance(row, dict)]
    reader = rows.recognise(firsts, options.columns, name=options.layout, parse_json=options.parse_json, advice=ADVICE)
    told = Applied()
    try:
        with together() as new:
            for source, out in zip(sources, outs, strict=True):
                out.parent.mkdir(parents=True, exist_ok=True)
                _write(source, reader, decided, options.prefix, format, new(out), told)
            if missing := len(decided.keys() - told.found):
                raise DataError(
                    f"{missing} of {len(decided)} decisions are of pairs that {options.input} does not have: give the "
                    "file that they were made on; nothing was written"
                )
    finally:
        if options.from_stdin:
            sources[0].paths[0].unlink(missing_ok=True)
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
    given = (row for row in source.rows() if isinstance(row, dict))
    names = column_names(given) if format in ("csv", "tsv") else []
    write_text(path, kept(told), format, names, packed=path.name.endswith(".gz.new"))
