import csv
import gzip
import io
import json
import re

import pyarrow as pa
import pytest
from pyarrow import parquet

from inward_client import rows
from inward_client.rows import DataError, Source, find, format_of

ROWS = [
    {"prompt": f"question {n}", "chosen": "yes,\nplease" if n % 2 else 'say "no"', "rejected": f"antwört {n}"}
    for n in range(2500)
]


def write_saved(folder, rows):
    """As Hugging Face's ``save_to_disk`` writes a dataset: two Arrow streams and a list of them."""
    folder.mkdir(parents=True)
    names = []
    for n, part in enumerate((rows[:1700], rows[1700:])):
        table = pa.Table.from_pylist(part)
        names.append({"filename": f"data-{n:05}-of-00002.arrow"})
        with (
            pa.OSFile(str(folder / names[-1]["filename"]), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=1000)
    (folder / "state.json").write_text(json.dumps({"_data_files": names, "_split": "train"}))
    return folder


def write(folder, ending):
    path = folder / f"rows{ending}"
    if ending == ".parquet":
        parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=700)
    elif ending == ".arrow":
        return write_saved(folder / "saved", ROWS)
    elif ending.startswith((".csv", ".tsv")):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, [*ROWS[0]], delimiter="\t" if ending == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(ROWS)
        data = text.getvalue().encode()
        path.write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)
    elif ending == ".json":
        path.write_text("\ufeff " + json.dumps(ROWS, indent=1), encoding="utf-8")
    else:
        text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"
        path.write_bytes(gzip.compress(text.encode()) if ending.endswith(".gz") else text.encode())
    return path


@pytest.fixture(params=[".jsonl", ".jsonl.gz", ".json", ".csv", ".csv.gz", ".tsv", ".parquet", ".arrow"])
def source(request, tmp_path):
    (found,) = find(write(tmp_path, request.param))
    return found


def test_every_format_gives_the_same_rows_in_order(source):
    assert source.count() == len(ROWS)
    assert list(source.rows()) == ROWS
    assert list(source.rows(1801)) == ROWS[1801:]


def test_a_limit_ends_every_format(source):
    first = Source(source.name, source.paths, source.format, limit=1203)
    assert first.count() == 1203
    assert list(first.rows()) == ROWS[:1203]
    assert list(first.rows(1200)) == ROWS[1200:1203]


def test_a_csv_record_with_another_number_of_fields_is_an_error_in_its_place(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,chosen\na,b\nonly one\nc,d\nx,y,z\n")
    rows = list(find(tmp_path / "a.csv")[0].rows())
    assert [isinstance(row, DataError) for row in rows] == [False, True, False, True]
    assert "line 3" in rows[1].message


def test_a_folder_gives_a_table_for_each_file_and_a_saved_dict_one_for_each_split(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "b.jsonl").write_text("{}\n")
    (folder / "a.csv").write_text("x\n1\n")
    (folder / "notes.txt").write_text("not a table")
    assert [(source.name, source.format) for source in find(folder)] == [("a", "csv"), ("b", "jsonl")]
    (folder / "a.json").write_text("{}\n")
    with pytest.raises(DataError, match="differ only in their ending"):
        find(folder)
    splits = tmp_path / "splits"
    write_saved(splits / "train", ROWS[:2000])
    write_saved(splits / "test", ROWS[:1800])
    (splits / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert [(source.name, source.count()) for source in find(splits)] == [("train", 2000), ("test", 1800)]


def bad(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


ROW = '{"prompt": "a"}\n'
LONG = "".join(f"{i * 7919 % 10007:x}" for i in range(9000))
TRUNCATED = gzip.compress(f'{ROW}{ROW}{{"prompt": "{LONG}"}}'.encode(), mtime=0)[:-150]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.parquet", "no", "can't be read as parquet"),
        ("a.arrow", "no", "can't be read as arrow"),
        ("a.jsonl", b"PAR1 and so on", "is a Parquet file"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd....", "zstd -d"),
        ("a.jsonl.gz", ROW, "is not packed with gzip"),
        ("a.jsonl.gz", TRUNCATED, "a.jsonl.gz, in line 3: can't be read to its end: the gzip data ends too early"),
        ("a.jsonl.gz", gzip.compress(ROW.encode(), mtime=0)[:-8] + b"\0" * 8, "the gzip data is damaged"),
        ("a.jsonl", ROW.encode("utf-16"), "iconv -f UTF-16"),
        ("a.jsonl", ROW.encode("utf-16-le"), "iconv -f UTF-16"),
        ("a.jsonl", ROW.encode("utf-32"), "iconv -f UTF-32"),
        ("a.jsonl", "\ufeff".encode("utf-32-be") + ROW.encode("utf-32-be"), "iconv -f UTF-32"),
        ("a.json", '[{"a": 1},\n{"b" 2}]', "a.json, element 2: not JSON"),
        ("a.json", '[{"a": 1} {"b": 2}]', "element 1: is not followed by a comma"),
        ("a.json", '[{"a": 1}', "element 1: is not followed by a comma, or by the array's end"),
        ("a.json", '[{"a": 1}] and more', "the array ends here, and more follows"),
        ("a.json", '[{"a": 1},', "element 2: not JSON"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.csv", "x,y,x\n1,2,3\n", "line 1: the heading has 'x' twice"),
        ("a.csv", "x;y\n1;2\n", "must be separated by ',', not by ';'"),
        ("a.csv", 'x,y\n1,2\n3,"4\n5,6\n', "in line 3: not readable as CSV"),
        ("a.csv", b"x,y\n1,2\n3,\xe9\n", "in line 3: is not UTF-8 .byte 0xe9.; iconv -f LATIN1"),
    ],
)
def test_a_file_that_can_not_be_read_is_one_line_with_the_place_and_the_remedy(tmp_path, name, content, said):
    path = bad(tmp_path, name, content)
    with pytest.raises(DataError, match=said) as error:
        [*find(path)[0].rows()]
    assert path.name in error.value.message
    assert "\n" not in error.value.message


def test_a_packed_file_is_read_whatever_its_name_and_however_many_parts_it_has(tmp_path):
    path = bad(tmp_path, "a.jsonl", gzip.compress(ROW.encode()) + gzip.compress(ROW.encode() * 2) + b"\0" * 8)
    assert [*find(path)[0].rows()] == [{"prompt": "a"}] * 3


def test_all_that_is_whole_of_a_truncated_file_can_be_read(tmp_path):
    source = find(bad(tmp_path, "a.jsonl.gz", TRUNCATED))[0]
    assert [*Source(source.name, source.paths, source.format, limit=2).rows()] == [{"prompt": "a"}] * 2


def test_a_byte_order_mark_is_not_a_part_of_the_first_row(tmp_path):
    for name, content in (("a.jsonl", ROW), ("a.json", f"[{ROW}]"), ("a.csv", "prompt\na\n")):
        assert [*find(bad(tmp_path, name, b"\xef\xbb\xbf" + content.encode()))[0].rows()] == [{"prompt": "a"}]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"not json", "not JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"a": "\xe9"}', "not UTF-8 .byte 0xe9."),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_a_line_that_is_no_row_is_an_error_in_its_place(tmp_path, line, said):
    path = bad(tmp_path, "a.jsonl", b"%b\n\n%b\r\n%b" % (ROW.strip().encode(), line, ROW.encode()))
    first, wrong, last = find(path)[0].rows()
    assert first == last == {"prompt": "a"}
    assert wrong.where == "a.jsonl, line 3"
    assert re.search(said, wrong.reason)


def test_elements_of_an_array_that_are_no_rows_stand_in_their_places(tmp_path):
    content = json.dumps([{"a": "]" * 200_000}, 12, None, {"b": [1, {"c": 2}]}])
    first, number, null, last = find(bad(tmp_path, "a.json", content))[0].rows()
    assert (len(first["a"]), last) == (200_000, {"b": [1, {"c": 2}]})
    assert [number.where, null.where] == ["a.json, element 2", "a.json, element 3"]


def test_what_is_not_there_or_has_no_known_name_says_so(tmp_path):
    (tmp_path / "empty").mkdir()
    for path, said in ((tmp_path / "empty", "have no"), (tmp_path / "gone", "does not exist")):
        with pytest.raises(DataError, match=said):
            find(path)
    with pytest.raises(DataError, match="must end with one of"):
        format_of(tmp_path / "pairs.xlsx")


def test_a_file_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    path = bad(tmp_path, "a.jsonl", ROW)
    source = find(path)[0]

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refused)
    with pytest.raises(DataError, match="can't be read: Permission denied"):
        [*source.rows()]


def test_shards_with_dots_in_their_names_are_different_tables(tmp_path):
    for name in ("train.v1.2.part-0.jsonl", "train.v1.2.part-1.jsonl.gz", "train.v1.csv"):
        text = "prompt\na\n" if name.endswith("csv") else ROW
        bad(tmp_path, name, gzip.compress(text.encode()) if name.endswith("gz") else text)
    assert [source.name for source in find(tmp_path)] == ["train.v1.2.part-0", "train.v1.2.part-1", "train.v1"]


def test_folders_of_a_hubs_snapshot_are_entered(tmp_path):
    hub = tmp_path / "datasets--org--name"
    for revision in ("aaa", "bbb"):
        data = hub / "snapshots" / revision / "data"
        data.mkdir(parents=True)
        (hub / "snapshots" / revision / "README.md").write_text("about")
        (hub / "snapshots" / revision / "dataset_infos.json").write_text("{}")
    (hub / "refs").mkdir()
    (hub / "refs/main").write_text("aaa")
    (hub / "blobs").mkdir()
    bad(hub / "blobs", "0123", ROW)
    (hub / "snapshots/aaa/data/train-00000-of-00001.jsonl").symlink_to(hub / "blobs/0123")
    for path in (hub, hub / "snapshots/aaa"):
        (source,) = find(path)
        assert (source.name, source.count()) == ("data/train-00000-of-00001", 1)


def test_a_column_that_is_there_twice_is_refused_in_parquet_too(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["x", "x"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has the column 'x' twice"):
        [*find(tmp_path / "a.parquet")[0].rows()]


def test_collected_rows_keep_their_numbers_and_tell_what_was_left_out(tmp_path):
    path = bad(tmp_path, "a.jsonl", ROW + "no\n" + ROW + "{}\n{}\n")
    found = rows.collect(path, lambda row: rows.get(row, "prompt"))
    assert (found.values, found.numbers) == (["a", "a"], [0, 2])
    (told,) = found.warnings()
    assert told.startswith(
        "3 of 5 rows are left out: 2 × 'prompt' is missing; the row has no columns (first: a.jsonl, line 4)"
    )
    with pytest.raises(DataError, match="has no rows"):
        rows.collect(bad(tmp_path, "b.jsonl", ""), dict)
    with pytest.raises(DataError, match="line 1: 'prompt' is missing"):
        rows.collect(bad(tmp_path, "c.jsonl", "{}"), lambda row: rows.get(row, "prompt"))


def test_a_dataset_that_the_real_library_saved_is_read(tmp_path):
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    datasets.Dataset.from_list(ROWS[:40]).save_to_disk(str(tmp_path / "saved"))
    (source,) = find(tmp_path / "saved")
    assert list(source.rows()) == ROWS[:40]
