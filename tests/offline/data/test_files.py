import gzip
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from inward.errors import DataError
from inward.offline.data.files import Cursor, Source, chunks, find, format_of

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
    elif ending == ".csv":
        import csv

        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, [*ROWS[0]])
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"
        path.write_bytes(gzip.compress(text.encode()) if ending.endswith(".gz") else text.encode())
    return path


@pytest.fixture(params=[".jsonl", ".jsonl.gz", ".csv", ".parquet", ".arrow"])
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


def test_a_cursor_reads_chunks_forwards_with_gaps_and_back(source):
    parts = chunks([source.count()], 256)
    assert sum(chunk.rows for chunk in parts) == len(ROWS) and parts[-1].rows == len(ROWS) % 256
    cursor = Cursor([source])
    for number in (0, 1, 5, 9, 2, 3):
        start = parts[number].start
        assert cursor.read(parts[number]) == ROWS[start : start + parts[number].rows]


def test_a_file_that_becomes_shorter_while_it_is_read_is_noticed(tmp_path):
    path = write(tmp_path, ".jsonl")
    (source,) = find(path)
    parts = chunks([source.count()], 256)
    path.write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(DataError, match="shorter"):
        Cursor([source]).read(parts[1])


def test_a_line_that_is_no_row_is_an_error_in_its_place(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\nnot json\n\n[1]\n{"prompt": "b"}\n')
    rows = list(find(tmp_path / "a.jsonl")[0].rows())
    assert rows[0] == {"prompt": "a"} and rows[3] == {"prompt": "b"}
    assert "line 2: not JSON" in rows[1].message
    assert "line 4: must be a JSON object" in rows[2].message


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
    (folder / "a.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="differ only in their ending"):
        find(folder)
    splits = tmp_path / "splits"
    write_saved(splits / "train", ROWS[:2000])
    write_saved(splits / "test", ROWS[:1800])
    (splits / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert [(source.name, source.count()) for source in find(splits)] == [("train", 2000), ("test", 1800)]


def test_what_can_not_be_read_says_so(tmp_path):
    (tmp_path / "array.json").write_text('[{"prompt": "a"}]')
    (tmp_path / "broken.parquet").write_text("no")
    (tmp_path / "empty").mkdir()
    for path, said in (
        (tmp_path / "array.json", "one JSON array"),
        (tmp_path / "empty", "has no"),
        (tmp_path / "gone", "does not exist"),
    ):
        with pytest.raises(DataError, match=said):
            find(path)
    with pytest.raises(DataError, match="can't be read as parquet"):
        list(find(tmp_path / "broken.parquet")[0].rows())
    with pytest.raises(DataError, match="must end with one of"):
        format_of(tmp_path / "pairs.xlsx")


def test_a_dataset_that_the_real_library_saved_is_read(tmp_path):
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    datasets.Dataset.from_list(ROWS[:40]).save_to_disk(str(tmp_path / "saved"))
    (source,) = find(tmp_path / "saved")
    assert list(source.rows()) == ROWS[:40]
