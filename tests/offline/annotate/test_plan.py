"""What is refused before a model is loaded, and what is told."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from inward.errors import SetupError
from inward.offline.annotate.options import AnnotateOptions
from inward.offline.annotate.plan import plan
from inward_client.rows import DataError

ROW = {"prompt": "four", "chosen": "five5", "rejected": "six6"}


@pytest.fixture
def path(tmp_path):
    return put(tmp_path / "in.jsonl", [ROW] * 3)


def put(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_plan_says_what_is_read_and_where_it_goes(path, tmp_path):
    planned = plan(AnnotateOptions(path, tmp_path / "out.jsonl", limit=2))
    assert [(table.source.name, table.out, table.format) for table in planned.tables] == [
        ("in", tmp_path / "out.jsonl", "jsonl")
    ]
    assert (planned.counts, planned.characters, planned.notes) == ((2,), 13.0, ())


@pytest.mark.parametrize("name", ["in.jsonl", "soft.jsonl", "hard.jsonl", "folder/../in.jsonl"])
@pytest.mark.parametrize("restart", [False, True])
def test_an_input_is_never_written_to_by_whatever_name(path, tmp_path, name, restart):
    (tmp_path / "folder").mkdir()
    (tmp_path / "soft.jsonl").symlink_to(path)
    (tmp_path / "hard.jsonl").hardlink_to(path)
    with pytest.raises(SetupError, match="an input is never written to") as error:
        plan(AnnotateOptions(path, tmp_path / name, restart=restart))
    assert "--restart" not in error.value.message


@pytest.mark.parametrize("read", ["out.jsonl.rejected.jsonl", "page.html", ".out.jsonl.new"])
def test_nor_is_anything_else_written_over_it(tmp_path, read):
    name = read if read.endswith(".jsonl") else "in.jsonl"
    path = put(tmp_path / name, [ROW])
    if name != read:
        (tmp_path / read).symlink_to(path)
    with pytest.raises(SetupError, match="an input is never written to"):
        plan(AnnotateOptions(path, tmp_path / "out.jsonl", html=tmp_path / "page.html", restart=True))


def test_an_output_inside_the_folder_that_is_read_is_refused(path, tmp_path):
    with pytest.raises(SetupError, match=r"lies in .* which is read"):
        plan(AnnotateOptions(tmp_path, tmp_path / "out"))


def test_what_parquet_can_not_hold_is_found_here(tmp_path):
    path = put(tmp_path / "in.jsonl", [{**ROW, "meta": {}}])
    with pytest.raises(DataError, match="'meta' holds empty objects"):
        plan(AnnotateOptions(path, tmp_path / "out.parquet"))
    assert plan(AnnotateOptions(path, tmp_path / "out.jsonl")).counts == (1,)


@pytest.mark.parametrize(("content", "said"), [("\n", "has no rows"), ("[1]\n", "must be a JSON object")])
def test_without_a_row_that_can_be_read_it_is_said_why(tmp_path, content, said):
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(DataError, match=said):
        plan(AnnotateOptions(tmp_path / "in.jsonl", tmp_path / "out.jsonl"))


def test_a_file_that_can_not_be_read_to_its_end_is_found_here(tmp_path):
    table = pa.table({name: [value] * 3000 for name, value in ROW.items()})
    parquet.write_table(table, tmp_path / "in.parquet", row_group_size=1000)
    content = (tmp_path / "in.parquet").read_bytes()
    (tmp_path / "in.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"in\.parquet can't be read as parquet"):
        plan(AnnotateOptions(tmp_path / "in.parquet", tmp_path / "out.parquet"))


def test_tables_of_a_folder_and_columns_that_are_not_read_are_told(tmp_path):
    (tmp_path / "in/data").mkdir(parents=True)
    put(tmp_path / "in/data/a.jsonl", [{**ROW, "history": [["a", "b"]]}])
    put(tmp_path / "in/b.jsonl", [ROW])
    planned = plan(AnnotateOptions(tmp_path / "in", tmp_path / "out"))
    assert [table.out for table in planned.tables] == [tmp_path / "out/b.parquet", tmp_path / "out/data/a.parquet"]
    assert planned.notes == ("not read: the columns 'history' (layout trl)", "read are 2 tables: b, data/a")


@pytest.mark.parametrize("out", ["-", "/dev/null"])
def test_standard_output_is_no_place_for_an_output(path, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SetupError, match="standard output or a device"):
        plan(AnnotateOptions(path, Path(out)))


@pytest.mark.parametrize("restart", [False, True])
def test_a_page_takes_the_place_of_a_page_and_of_nothing_else(path, tmp_path, restart):
    (tmp_path / "page.html").write_text("<!doctype html>\n<p>an older one")
    plan(AnnotateOptions(path, tmp_path / "out.jsonl", html=tmp_path / "page.html", restart=restart))
    (tmp_path / "rows.csv").write_text("a,b\n")
    with pytest.raises(SetupError, match=r"rows.csv is there already and is no page"):
        plan(AnnotateOptions(path, tmp_path / "out.jsonl", html=tmp_path / "rows.csv", restart=restart))


def test_records_are_overwritten_as_an_output_is(path, tmp_path):
    records = tmp_path / "records.json"
    records.write_text("[]")
    with pytest.raises(SetupError, match=r"records.json is there already: --restart overwrites it"):
        plan(AnnotateOptions(path, tmp_path / "out.jsonl", argilla=records))
    plan(AnnotateOptions(path, tmp_path / "out.jsonl", argilla=records, restart=True))


@pytest.mark.parametrize("name", ["out.jsonl", "records.json"])
def test_what_is_written_is_in_files_of_their_own(path, tmp_path, name):
    with pytest.raises(SetupError, match=f"{name} is named twice"):
        plan(AnnotateOptions(path, tmp_path / "out.jsonl", html=tmp_path / name, argilla=tmp_path / "records.json"))
