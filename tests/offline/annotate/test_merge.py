import csv
import datetime
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from inward.offline.annotate import merge
from inward.offline.annotate.merge import Shape, Table
from inward.offline.annotate.scorer import COLUMNS, Annotated
from inward_client.rows import LAYOUTS, DataError, PairReader, find, format_of

ROWS = [{"prompt": f"p{n}", "chosen": "a", "rejected": "ö", "n": n} for n in range(5)]
VALUES = {
    "margin": 4.5,
    "margin_scaled": -0.5,
    "margin_bin": 0.25,
    "confidence": None,
    "chosen_score": 1.0,
    "rejected_score": 2.0,
}
RESULTS = [Annotated({**VALUES, "label_agrees": False}) if n != 2 else Annotated(None, "too long") for n in range(5)]
KEPT = [0, 1, 3, 4]


def merged(tmp_path, source, name, results=RESULTS, **shape):
    out = tmp_path / name
    looks = Shape(PairReader(LAYOUTS[shape.pop("layout", "trl")]), **shape)
    schema = merge.schema_for(source, looks) if name.endswith(".parquet") else None
    merge.write(Table(source, out, format_of(out), looks, schema), out, lambda: iter(results), {"model": "m"})
    return out


@pytest.fixture
def lines(tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return find(tmp_path / "in.jsonl")[0]


def test_json_lines_keep_their_fields_and_lose_only_the_rows_without_a_margin(tmp_path, lines):
    out = merged(tmp_path, lines, "out.jsonl")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["n"] for row in rows] == KEPT
    assert rows[0] == {**ROWS[0], **RESULTS[0].columns, "label_probability": None}
    assert "ö" in out.read_text()


def test_csv_has_a_heading_for_everything(tmp_path, lines):
    with merged(tmp_path, lines, "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["n"] for row in rows] == ["0", "1", "3", "4"]
    assert set(COLUMNS) < set(rows[0])
    assert rows[0]["confidence"] == ""


@pytest.mark.parametrize(("trl", "given"), [(False, list(ROWS[0])), (True, ["prompt", "chosen", "rejected", "n"])])
def test_csv_has_its_heading_where_no_row_is_left_too(tmp_path, lines, trl, given):
    out = merged(tmp_path, lines, "out.csv", [Annotated(None, "not asked for")] * 5, trl=trl)
    assert next(csv.reader([out.read_text()])) == [*given, *COLUMNS]


def test_parquet_from_lines_finds_types_and_carries_the_metadata(tmp_path, lines):
    out = merged(tmp_path, lines, "out.parquet")
    schema = parquet.read_schema(out)
    assert schema.field("margin").type == pa.float64() and schema.field("label_agrees").type == pa.bool_()
    assert json.loads(schema.metadata[b"inward"]) == {"model": "m"}
    assert [row["n"] for row in parquet.read_table(out).to_pylist()] == KEPT


def test_parquet_from_parquet_keeps_every_type(tmp_path):
    at = datetime.datetime(2026, 1, 2, 3, 4, 5, 6789)
    table = pa.table(
        {
            "prompt": pa.array(["p"] * 5).dictionary_encode(),
            "chosen": pa.array(["a"] * 5, pa.large_string()),
            "rejected": ["b"] * 5,
            "when": pa.array([at] * 5, pa.timestamp("us")),
            "small": pa.array(range(5), pa.int8()),
            "margin": pa.array([9] * 5, pa.int32()),
        }
    ).replace_schema_metadata({"huggingface": "{}", "mine": "kept"})
    parquet.write_table(table, tmp_path / "in.parquet")
    out = merged(tmp_path, find(tmp_path / "in.parquet")[0], "out.parquet")
    got = parquet.read_table(out)
    for name in ("chosen", "rejected", "when", "small"):
        assert got.schema.field(name).type == table.schema.field(name).type
    assert got.column("small").to_pylist() == KEPT
    assert got.column("margin").to_pylist() == [4.5] * 4
    assert got.schema.metadata[b"mine"] == b"kept" and b"huggingface" not in got.schema.metadata


def test_columns_that_differ_from_row_to_row_are_joined(tmp_path):
    rows = [{**ROWS[n], **({"extra": n} if n == 4 else {"other": None})} for n in range(5)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    got = parquet.read_table(merged(tmp_path, find(tmp_path / "in.jsonl")[0], "out.parquet")).to_pylist()
    assert [row["extra"] for row in got] == [None, None, None, 4]


def test_for_trl_the_pair_is_rewritten_and_the_margin_is_the_bin(tmp_path):
    chat = [{"role": "user", "content": "q"}]
    row = {
        "chosen": [*chat, {"role": "assistant", "content": "a"}],
        "rejected": [*chat, {"role": "assistant", "content": "b"}],
        "id": 1,
    }
    (tmp_path / "in.jsonl").write_text((json.dumps(row) + "\n") * 5)
    out = merged(tmp_path, find(tmp_path / "in.jsonl")[0], "out.parquet", layout="chat", trl=True)
    got = parquet.read_table(out).to_pylist()[0]
    assert got["prompt"] == chat and got["rejected"] == [{"role": "assistant", "content": "b"}]
    assert got["margin"] == got["margin_bin"] == 0.25
    assert got["id"] == 1


def test_a_prefix_stands_before_every_new_column(tmp_path, lines):
    row = json.loads(merged(tmp_path, lines, "out.jsonl", prefix="inward_").read_text().splitlines()[0])
    assert row["inward_margin"] == 4.5 and "margin" not in row


def test_rows_left_out_are_written_with_their_reason_and_place(tmp_path, lines):
    out = tmp_path / "out.rejected.jsonl"
    merge.write_rejected([lines], lambda _: iter(RESULTS), out)
    assert json.loads(out.read_text()) == {
        "source": "in.jsonl", "row": 3, "where": "in.jsonl, line 3", "reason": "too long", "content": ROWS[2],
    }  # fmt: skip
    merge.write_rejected([lines], lambda _: iter([RESULTS[0]] * 5), out)
    assert not out.exists()


def put(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return find(path)[0]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([[1], "x", "x", "x", "x"], "'n' of row 2 holds a value of another type"),
        ([1, 2, 2**64, 4, 5], "'n' of row 3 holds an integer that does not fit"),
        ([0.5, 1, 2, 2**53 + 1, 3], "'n' of row 4 holds an integer that a column of fractions"),
        (["a", "\ud800", "b", "c", "d"], "'n' of row 2 holds text that is not Unicode"),
        ([{}, {}, {}, {}, {}], "'n' holds empty objects"),
        ([{"a": [{}]}] * 5, "'n' holds empty objects"),
    ],
)
def test_what_parquet_can_not_hold_is_found_without_any_result_and_kept_in_json_lines(tmp_path, values, said):
    source = put(tmp_path / "in.jsonl", [{**row, "n": value} for row, value in zip(ROWS, values, strict=True)])
    with pytest.raises(DataError, match=said) as error:
        merge.schema_for(source, Shape(PairReader(LAYOUTS["trl"])))
    assert "write JSON lines instead" in error.value.message
    lines = merged(tmp_path, source, "out.jsonl").read_text().splitlines()
    assert [json.loads(line)["n"] for line in lines] == [values[n] for n in KEPT]


def test_types_that_change_between_pieces_of_a_file_are_found_as_well(tmp_path):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "n": n if n < 1500 else str(n)} for n in range(2000)]
    with pytest.raises(DataError, match=r"'n' .*write JSON lines instead"):
        merge.schema_for(put(tmp_path / "in.jsonl", rows), Shape(PairReader(LAYOUTS["trl"])))


def test_rows_that_hold_no_pair_do_not_decide_what_parquet_can_hold(tmp_path):
    source = put(tmp_path / "in.jsonl", [*ROWS, {"prompt": "p", "n": {}}, {"n": "text"}])
    assert merge.schema_for(source, Shape(PairReader(LAYOUTS["trl"]))).field("n").type == pa.int64()


def test_a_type_that_parquet_lacks_is_named(tmp_path):
    table = pa.table({"prompt": ["p"], "chosen": ["a"], "rejected": ["b"]})
    table = table.append_column("every", pa.array([None], pa.month_day_nano_interval()))
    with pa.OSFile(str(tmp_path / "in.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match="'every' holds the type month_day_nano_interval"):
        merge.schema_for(find(tmp_path / "in.arrow")[0], Shape(PairReader(LAYOUTS["trl"])))


def test_types_without_kernels_pass_as_they_are(tmp_path):
    table = pa.table(
        {
            "prompt": pa.array(["p"] * 5, pa.large_string()),
            "chosen": pa.array(["a"] * 5, pa.string_view()),
            "rejected": pa.array(["b"] * 5).dictionary_encode(),
            "bytes": pa.array([b"\xff"] * 5, pa.binary_view()),
            "n": pa.array([[n] for n in range(5)], pa.list_view(pa.int8())),
        }
    )
    parquet.write_table(table, tmp_path / "in.parquet")
    (source,) = find(tmp_path / "in.parquet")
    got = parquet.read_table(merged(tmp_path, source, "out.parquet"))
    assert [got.schema.field(name).type for name in table.schema.names] == [field.type for field in source.schema()]
    assert got.column("n").to_pylist() == [[n] for n in KEPT]
    row = json.loads(merged(tmp_path, source, "out.jsonl").read_text().splitlines()[0])
    assert row["bytes"] == "/w=="


ODD = [{**ROWS[n], "x": [float("nan"), float("inf"), 0.5, 1e999, {"a": [float("nan"), 1]}][n]} for n in range(5)]


def test_json_lines_are_strict_json(tmp_path):
    rows = [{**row, "big": 10**30, "half": "\ud800"} for row in ODD]
    text = merged(tmp_path, put(tmp_path / "in.jsonl", rows), "out.jsonl").read_text(encoding="utf-8")

    def refuse(constant):
        raise AssertionError(constant)

    got = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert [row["x"] for row in got] == [None, None, None, {"a": [None, 1]}]
    assert all((row["big"], row["half"]) == (10**30, "\ud800") for row in got)


def test_nested_cells_of_a_csv_file_are_json(tmp_path):
    rows = [{**row, "meta": {"a": [1, "ö", None]}, "half": "\ud800"} for row in ODD]
    with merged(tmp_path, put(tmp_path / "in.jsonl", rows), "out.csv").open(encoding="utf-8", newline="") as file:
        got = list(csv.DictReader(file))
    assert [json.loads(row["meta"]) for row in got] == [{"a": [1, "ö", None]}] * 4
    assert [row["x"] for row in got] == ["", "", "", '{"a": [null, 1]}']
    assert got[0]["half"] == "\\ud800"


def test_for_trl_the_context_stands_in_the_prompt_and_nowhere_else(tmp_path):
    row = {"system": "Be brief.", "prompt": "q", "chosen": "a", "rejected": "b", "id": 1}
    source = put(tmp_path / "in.jsonl", [row] * 5)
    got = json.loads(merged(tmp_path, source, "out.jsonl", trl=True).read_text().splitlines()[0])
    assert got["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}]
    assert got["chosen"] == [{"role": "assistant", "content": "a"}]
    assert ("system" in got, got["id"]) == (False, 1)


def test_files_take_their_places_together_or_not_at_all(tmp_path):
    first, second, gone = (tmp_path / name for name in ("first", "second", "gone"))
    first.write_text("before")
    with pytest.raises(KeyboardInterrupt), merge.together() as new:
        new(first).write_text("after")
        new(second).write_text("after")
        raise KeyboardInterrupt
    assert first.read_text() == "before" and [path.name for path in tmp_path.iterdir()] == ["first"]
    gone.write_text("before")
    with merge.together() as new:
        new(first).write_text("after")
        new(gone)
        assert first.read_text() == "before"
    assert first.read_text() == "after" and [path.name for path in tmp_path.iterdir()] == ["first"]
