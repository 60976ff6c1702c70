import csv
import datetime
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from inward.offline.annotate import merge
from inward.offline.annotate.asking import COLUMNS, Annotated
from inward.offline.annotate.merge import Shape
from inward.offline.data.files import find, format_of
from inward.offline.data.layouts import LAYOUTS

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


def merged(tmp_path, source, name, **shape):
    out = tmp_path / name
    layout = LAYOUTS[shape.pop("layout", "trl")]
    merge.write(source, lambda: iter(RESULTS), out, format_of(out), Shape(layout, {}, **shape), {"model": "m"})
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".new")] == []
    return out


@pytest.fixture
def lines(tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return find(tmp_path / "in.jsonl")[0]


def test_json_lines_keep_their_fields_and_lose_only_the_rows_without_a_margin(tmp_path, lines):
    out = merged(tmp_path, lines, "out.jsonl")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["n"] for row in rows] == KEPT
    assert rows[0] == {**ROWS[0], **RESULTS[0].columns}
    assert "ö" in out.read_text()


def test_csv_has_a_heading_for_everything(tmp_path, lines):
    with merged(tmp_path, lines, "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["n"] for row in rows] == ["0", "1", "3", "4"]
    assert set(COLUMNS) < set(rows[0])
    assert rows[0]["confidence"] == ""


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
    assert merge.write_rejected([lines], lambda _: iter(RESULTS), out) == 1
    assert json.loads(out.read_text()) == {"source": "in.jsonl", "row": 3, "reason": "too long", "content": ROWS[2]}
    assert merge.write_rejected([lines], lambda _: iter([RESULTS[0]] * 5), out) == 0
    assert not out.exists()


def test_a_column_of_several_types_is_refused_for_parquet_and_kept_in_json_lines(tmp_path):
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({**row, "n": [1] if row["n"] else "x"}) + "\n" for row in ROWS)
    )
    (source,) = find(tmp_path / "in.jsonl")
    with pytest.raises(Exception, match="write JSON lines instead"):
        merged(tmp_path, source, "out.parquet")
    assert json.loads(merged(tmp_path, source, "out.jsonl").read_text().splitlines()[1])["n"] == [1]
