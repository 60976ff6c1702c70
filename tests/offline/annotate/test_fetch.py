import io
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pyarrow as pa
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from pyarrow import parquet

from inward.errors import SetupError
from inward.offline.annotate import fetch
from inward_client.rows import find


def given(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))


@pytest.mark.parametrize("content", [b'{"a": 1}\n{"a": 2}\n', b' [{"a": 1}, {"a": 2}]'])
def test_standard_input_is_read_as_lines_or_an_array_and_the_same_content_has_the_same_time(
    tmp_path, monkeypatch, content
):
    times = []
    for _ in range(2):
        given(monkeypatch, content)
        path = fetch.spool(tmp_path / "out.jsonl")
        times.append(path.stat().st_mtime_ns)
    assert [row["a"] for row in find(path)[0].rows()] == [1, 2]
    assert times[0] == times[1]
    given(monkeypatch, content + b" ")
    assert fetch.spool(tmp_path / "out.jsonl").stat().st_mtime_ns != times[0]


def test_nothing_on_standard_input_is_said(tmp_path, monkeypatch):
    given(monkeypatch, b"")
    with pytest.raises(SetupError, match="nothing came"):
        fetch.spool(tmp_path / "out.jsonl")
    assert not list(tmp_path.iterdir())


def test_standard_input_needs_the_folder_of_the_output(tmp_path, monkeypatch):
    given(monkeypatch, b"{}")
    with pytest.raises(SetupError, match="nodir is not a folder"):
        fetch.spool(tmp_path / "nodir/out.jsonl")


def test_a_path_that_is_there_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org/data").touch()
    assert (
        not fetch.is_hub_id(Path("org/data")) and not fetch.is_hub_id(Path("a/b/c")) and not fetch.is_hub_id(Path("x"))
    )
    assert fetch.is_hub_id(Path("org/other"))


def hub(monkeypatch, folder, asked):
    def snapshot_download(name, **options):
        asked.append((name, options["revision"], options["allow_patterns"]))
        if folder is None:
            raise LocalEntryNotFoundError("no connection\nmore")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def test_a_split_of_a_hubs_dataset_is_one_table_of_all_its_files(tmp_path, monkeypatch):
    for config, split, file, ids in (("default", "train", "0000", [1, 2]), ("default", "train", "0001", [3]),
                                     ("default", "test", "0000", [4])):  # fmt: skip
        place = tmp_path / config / split
        place.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.table({"id": ids}), place / f"{file}.parquet")
    asked = []
    hub(monkeypatch, tmp_path, asked)
    source = fetch.from_hub("org/data", "train")
    assert [row["id"] for row in source.rows()] == [1, 2, 3] and source.count() == 3
    assert asked == [("org/data", "refs/convert/parquet", "*/train/*.parquet")]
    with pytest.raises(SetupError, match="no split 'dev'"):
        fetch.from_hub("org/data", "dev")
    (tmp_path / "other/train").mkdir(parents=True)
    parquet.write_table(pa.table({"id": [9]}), tmp_path / "other/train/0000.parquet")
    with pytest.raises(SetupError, match="default, other"):
        fetch.from_hub("org/data", "train")
    assert [row["id"] for row in fetch.from_hub("org/data", "train", "other").rows()] == [9]


def test_a_hub_that_is_not_reached_is_one_line(monkeypatch):
    hub(monkeypatch, None, [])
    with pytest.raises(SetupError, match=r"org/data is no path here, and was not fetched .*: no connection$"):
        fetch.from_hub("org/data", "train")
