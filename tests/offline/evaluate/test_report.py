"""Files to rows, and which part of the report each row belongs to."""

import json

import pytest

from inward.errors import DataError
from inward.offline.evaluate.report import read_rows

SOURCES = ("pairs", "lists", "responses")


def row(source, n, **more):
    answers = {
        "pairs": {"chosen": "a", "rejected": "b"},
        "lists": {"responses": [{"text": "a", "safe": True}, {"text": "b", "safe": False}]},
        "responses": {"response": "a", "safe": True},
    }
    return {"prompt": f"p{n}", **answers[source], **more}


def read(path, source, rows, by="part", limit=None):
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows))
    return read_rows(source, path, limit, by=by)


def by_prompt(found):
    """Of each prompt the parts of its responses."""
    parts = iter(found.parts)
    return {one.prompt: {next(parts) for _ in one.responses} for one in found.lists}


@pytest.mark.parametrize("source", SOURCES)
def test_rows_that_are_left_out_shift_no_other_row_into_another_part(tmp_path, source):
    broken = {"prompt": "p1", "chosen": None, "rejected": "b", "responses": [], "response": None, "part": "B"}
    rows = [row(source, 0, part="A"), broken, row(source, 2, part="C"), "{", row(source, 4, part="D")]
    found = read(tmp_path / "x.jsonl", source, rows)
    assert by_prompt(found) == {"p0": {"A"}, "p2": {"C"}, "p4": {"D"}}
    assert len(found.parts) == len(found.texts)
    assert by_prompt(read(tmp_path / "x.jsonl", source, rows, limit=2)) == {"p0": {"A"}, "p2": {"C"}}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("values", "names"), [((0, 1), ("0", "1")), ((False, None), ("False", "none"))])
def test_zero_and_false_are_parts_and_nothing_is_none(tmp_path, source, values, names):
    rows = [row(source, n, part=values[n % 2]) for n in range(4)]
    assert by_prompt(read(tmp_path / "x.jsonl", source, rows)) == {f"p{n}": {names[n % 2]} for n in range(4)}


@pytest.mark.parametrize("source", SOURCES)
def test_a_part_takes_no_row_from_the_whole(tmp_path, source):
    rows = [row(source, n, part=None if n else "A") for n in range(3)]
    divided = read(tmp_path / "x.jsonl", source, rows)
    assert (divided.lists, divided.data) == (
        (whole := read(tmp_path / "x.jsonl", source, rows, by=None)).lists,
        whole.data,
    )


@pytest.mark.parametrize("source", SOURCES)
def test_a_column_that_no_row_has_is_refused(tmp_path, source):
    with pytest.raises(DataError, match="no column 'part'"):
        read(tmp_path / "x.jsonl", source, [row(source, 0, part=None), row(source, 1)])
