"""Preference data in a notebook: a list, a pandas or polars frame or a ``datasets.Dataset`` in, the same out with
columns.

None of those libraries is imported that the caller has not.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any, TypeVar, cast

from inward_client.answers import ItemError, Margin
from inward_client.calls import listed
from inward_client.client import Inward
from inward_client.errors import StatusError
from inward_client.rows import AUTO, DataError, Pair, PairReader, recognise

T = TypeVar("T")
COLUMNS = (
    "margin", "margin_scaled", "margin_bin", "label_probability", "confidence", "chosen_score", "rejected_score",
    "label_agrees",
)  # fmt: skip
"""What an annotation adds to a row."""
ADVICE = 'Name one with layout=…, or say which columns to take: columns={"prompt": "question", "chosen": "answer_a", …}'
ERROR = "annotation_error"
"""Beside them: why a row has none."""
PLACE = re.compile(r"^pairs\.\d+\.")
"""At the beginning of a message: among the pairs that were asked about, which are not all of the rows."""
Rows = list[dict[str, Any]]


def annotate(
    data: T,
    client: Inward | None = None,
    *,
    head: str | None = None,
    truncate: bool = False,
    layout: str = AUTO,
    columns: Mapping[str, str] | None = None,
    prefix: str = "",
    progress: bool | None = None,
) -> T:
    """``data`` with the columns of an annotation, in the same order and of the same kind; it is not changed itself.

    A row that can't be annotated stays, with nothing in the new columns and the reason in ``annotation_error``.

    Args:
        data: rows as a list of dicts, a pandas or polars DataFrame, a ``datasets.Dataset``, or a dict of any of these
            (a ``DatasetDict``).
        client: by default one of ``INWARD_URL``.
        head: that gives the margins; by default the service's first LEGEND head.
        truncate: cut text that is longer than the model takes.
        layout: of the pairs; by default recognised (see ``inward_client.rows``).
        columns: the layout's columns → the data's, such as ``{"prompt": "question"}``.
        prefix: before the names of the new columns.
        progress: show a bar; by default where tqdm is installed.

    Raises:
        TypeError: data of another kind.
        DataError: no layout of pairs is recognised, or the new columns are there already.
        InwardError: the service could not do its part.
    """
    shown = find_spec("tqdm") is not None if progress is None else progress
    with Inward() if client is None else nullcontext(client) as asked:

        def new(rows: Rows) -> dict[str, list[Any]]:
            """The new columns of some rows."""
            if taken := sorted({prefix + name for name in (*COLUMNS, ERROR)} & {name for row in rows for name in row}):
                raise DataError(f"the data have the columns {', '.join(taken)} already: a prefix keeps them")
            reader = recognise(rows, columns, name=layout, advice=ADVICE) if rows else None
            return _columns(_asked(rows, reader, asked, head, truncate, shown) if reader else [], prefix)

        return cast(T, _of_kind(data)(data, new))


def _asked(
    rows: Rows, reader: PairReader, client: Inward, head: str | None, truncate: bool, progress: bool
) -> list[tuple[Margin | None, str | None]]:
    """Of each row its margin, or why there is none."""
    pairs = [_pair(reader, row) for row in rows]
    good = [pair for pair in pairs if isinstance(pair, Pair)]
    if not good:
        return [(None, str(pair)) for pair in pairs]
    bodies = [pair.body() for pair in good]
    try:
        found = client.margin(bodies, head=head, truncate=truncate, progress=progress).margins
    except StatusError as error:  # of rows of which none can be scored each has its reason, too
        if not error.each:
            raise
        found = [Margin(error=ItemError(one.message)) for one in error.each]
    margins = iter(zip(good, found, strict=True))
    return [_told(*next(margins)) if isinstance(pair, Pair) else (None, pair) for pair in pairs]


def _pair(reader: PairReader, row: Mapping[str, Any]) -> Pair | str:
    try:
        return reader.pair(row)
    except DataError as error:
        return error.reason


def _told(pair: Pair, margin: Margin) -> tuple[Margin | None, str | None]:
    """Equal answers have no margin and no verdict, whatever rounding makes of their scores."""
    if margin.error is not None:
        return None, PLACE.sub("", margin.error.message)
    if not pair.tie:
        return margin, None
    scaled = None if margin.margin_scaled is None else 0.0
    return Margin(**{**vars(margin), "margin": 0.0, "margin_scaled": scaled, "label_agrees": None}), None


def _columns(told: Sequence[tuple[Margin | None, str | None]], prefix: str) -> dict[str, list[Any]]:
    found = {
        prefix + name: [margin and getattr(margin, "bin" if name == "margin_bin" else name) for margin, _ in told]
        for name in COLUMNS
    }
    return {**found, prefix + ERROR: [error for _, error in told]}


def _of_kind(data: Any) -> Callable[[Any, Callable[[Rows], dict[str, list[Any]]]], Any]:
    """How data of this kind are read and written.

    Raises:
        TypeError: no way is known, also of a part of a dict.
    """
    if isinstance(data, Mapping):
        return _of_parts({name: _of_kind(part) for name, part in data.items()})
    if _is(data, "pandas", "DataFrame"):
        return _of_pandas
    if _is(data, "polars", "DataFrame"):
        return _of_polars
    if _is(data, "datasets", "Dataset"):
        return _of_dataset
    if isinstance(data, Iterable) and not isinstance(data, str | bytes) and type(data).__module__ == "builtins":
        return _of_list
    stream = _is(data, "datasets", "IterableDataset")
    instead = ": give list(data.take(n)), or the files of the stream to inward annotate" if stream else ""
    raise TypeError(
        "annotate takes a list of dicts, a pandas or polars DataFrame or a datasets.Dataset, not "
        f"{type(data).__name__}{instead}"
    )


def _is(data: Any, library: str, kind: str) -> bool:
    """Whether this is one of a library's kind; of a library that is not imported there is none."""
    return isinstance(data, getattr(sys.modules.get(library), kind, ()))


def _of_parts(ways: Mapping[Any, Callable[..., Any]]) -> Callable[[Any, Callable[[Rows], dict[str, list[Any]]]], Any]:
    return lambda parts, new: type(parts)({name: ways[name](part, new) for name, part in parts.items()})


def _of_pandas(frame: Any, new: Callable[[Rows], dict[str, list[Any]]]) -> Any:
    import pandas as pd

    nothing = (pd.NA, pd.NaT)

    def plain(value: Any) -> Any:
        """As JSON has it: arrays are lists, and what pandas writes for nothing (NaN, NA, NaT) is None."""
        if isinstance(value, dict):
            return {name: plain(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        if hasattr(value, "tolist"):  # of numpy
            return plain(value.tolist())
        return None if any(value is one for one in nothing) or value != value else value

    return frame.assign(**_objects(frame, new([plain(row) for row in frame.to_dict("records")])))


def _of_list(rows: Any, new: Callable[[Rows], dict[str, list[Any]]]) -> Any:
    rows = [dict(row) for row in listed("data", rows)]
    added = new(rows)
    return [{**row, **{name: values[n] for name, values in added.items()}} for n, row in enumerate(rows)]


def _objects(frame: Any, added: dict[str, list[Any]]) -> dict[str, Any]:
    """Columns with the frame's own index; true, false and nothing are kept apart."""
    import pandas as pd

    return {
        name: pd.Series(values, index=frame.index, dtype=_type(name, "float64", "boolean", "object"))
        for name, values in added.items()
    }


def _of_polars(frame: Any, new: Callable[[Rows], dict[str, list[Any]]]) -> Any:
    import polars as pl

    return frame.with_columns(
        pl.Series(name, values, dtype=_type(name, pl.Float64, pl.Boolean, pl.String))
        for name, values in new(frame.to_dicts()).items()
    )


def _of_dataset(data: Any, new: Callable[[Rows], dict[str, list[Any]]]) -> Any:
    import datasets

    for name, values in new(data.to_list()).items():
        data = data.add_column(name, values, feature=datasets.Value(_type(name, "float64", "bool", "string")))
    return data


def _type(name: str, number: Any, truth: Any, text: Any) -> Any:
    """Of a new column, whatever its prefix."""
    return truth if name.endswith("label_agrees") else text if name.endswith(ERROR) else number
