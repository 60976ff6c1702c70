import dataclasses
import json
import os

import pytest

from inward.errors import SetupError
from inward.offline.annotate import work
from inward.offline.annotate.scorer import COLUMNS, Annotated, Annotator
from inward.offline.annotate.work import Chunk, Cursor, Done, Progress, chunk_rows, chunks, do, identity
from inward_client.rows import LAYOUTS, DataError, PairReader, find

READER = PairReader(LAYOUTS["trl"])

DONE = Done(
    [
        Annotated({"margin": 0.1 + 0.2, "label_agrees": True}),
        Annotated(None, "bad \u2028 row"),
        Annotated({}, None, True),
    ],
    {"policy_version": "base"},
)
ANNOTATOR = Annotator(
    "m", "r", "f", "float32", "base", "t", {"name": "legend", "kind": "legend", "version": 1}, None, "0.1.0"
)


def test_what_is_kept_comes_back_bit_for_bit(tmp_path):
    chunk = Chunk(7, 0, 0, 3)
    with Progress(tmp_path / "out.jsonl", "a", restart=False) as progress:
        assert not progress.done(chunk)
        progress.keep(chunk, DONE)
    with Progress(tmp_path / "out.jsonl", "a", restart=False) as again:
        assert again.done(chunk)
        assert again.read(chunk) == DONE
        assert list(again.results([chunk])) == DONE.rows
        assert again.rows == 3
        again.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_was_cut_off_is_as_good_as_none_and_the_next_one_is_whole(tmp_path):
    first, second = Chunk(0, 0, 0, 3), Chunk(1, 0, 3, 3)
    with Progress(tmp_path / "out.jsonl", "a", restart=False) as progress:
        progress.keep(first, DONE)
        progress.keep(second, DONE)
    path = progress.folder / "done.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    with Progress(tmp_path / "out.jsonl", "a", restart=False) as again:
        assert (again.done(first), again.done(second), again.rows) == (True, False, 3)
        again.keep(second, DONE)
        assert again.read(first) == again.read(second) == DONE


def test_what_is_done_is_on_the_disk_after_two_seconds_and_whatever_ends_the_job(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(work.time, "monotonic", lambda: now[0])
    out = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt), Progress(out, "a", restart=False) as progress:
        path = progress.folder / "done.jsonl"
        for number, lines in enumerate([1, 1, 3, 3]):
            now[0] = 2.5 * (number > 1)
            progress.keep(Chunk(number, 0, 3 * number, 3), DONE)
            assert len(path.read_bytes().splitlines()) == lines
        raise KeyboardInterrupt
    assert len(path.read_bytes().splitlines()) == 4


def test_another_job_for_the_same_output_is_refused_unless_it_is_to_start_anew(tmp_path):
    chunk = Chunk(0, 0, 0, 3)
    with Progress(tmp_path / "out.jsonl", "a", restart=False) as progress:
        progress.keep(chunk, DONE)
    with pytest.raises(SetupError, match="--restart"):
        Progress(tmp_path / "out.jsonl", "b", restart=False)
    with Progress(tmp_path / "out.jsonl", "b", restart=True) as fresh:
        assert not fresh.done(chunk)


def test_two_processes_do_not_work_on_one_output(tmp_path):
    with (
        Progress(tmp_path / "out.jsonl", "a", restart=False),
        pytest.raises(SetupError, match="another inward annotate"),
    ):
        Progress(tmp_path / "out.jsonl", "a", restart=False)


def test_a_job_is_another_one_if_anything_that_the_numbers_depend_on_changes(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')

    def of(reader=READER, asked=(False, None, None), annotator=ANNOTATOR, rows=64):
        return identity(find(path), reader, asked, annotator, rows)

    same = of()
    assert same == of()
    newer = {**ANNOTATOR.head, "version": 2}
    others = [
        of(asked=(True, None, None)),
        of(PairReader(LAYOUTS["hh"])),
        of(dataclasses.replace(READER, parse_json=True)),
        of(dataclasses.replace(READER, rename={"system": ""})),
        of(annotator=dataclasses.replace(ANNOTATOR, fingerprint="g")),
        of(annotator=dataclasses.replace(ANNOTATOR, head=newer)),
        of(rows=65),
    ]
    os.utime(path, ns=(1, 1))
    others.append(of())
    assert len({same, *others}) == 9


ROWS = [{"prompt": f"question {n}", "chosen": "a", "rejected": "a" if n == 3 else "b"} for n in range(700)]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return find(path)[0]


def test_a_cursor_reads_chunks_forwards_with_gaps_and_back(source):
    parts = chunks([source.count()], 64)
    assert (sum(chunk.rows for chunk in parts), parts[-1].rows) == (700, 700 % 64)
    cursor = Cursor([source])
    for number in (0, 1, 5, 9, 2, 3):
        start = parts[number].start
        assert cursor.read(parts[number]) == ROWS[start : start + parts[number].rows]


def test_a_file_that_becomes_shorter_while_it_is_read_is_noticed(source):
    parts = chunks([source.count()], 64)
    source.paths[0].write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(DataError, match="shorter"):
        Cursor([source]).read(parts[1])


def test_a_chunk_never_spans_two_tables():
    parts = chunks([5, 0, 3], 4)
    assert [(chunk.source, chunk.start, chunk.rows) for chunk in parts] == [(0, 0, 4), (0, 4, 1), (2, 0, 3)]


def test_a_chunk_is_some_passes_of_the_model_whatever_the_length_of_the_rows():
    assert chunk_rows(1024, 4000) == 2
    assert chunk_rows(16384, 1000) == 131
    assert chunk_rows(1024, 10**6) == 1
    assert chunk_rows(1024, 0) == 256
    assert chunk_rows(None, 1000) == 64


class Noisy:
    """Says of every pair that the first answer is a hair better."""

    tokens = 1024

    async def annotate(self, pairs):
        given = dict.fromkeys(COLUMNS, 1e-07) | {"label_agrees": True, "margin_scaled": None}
        return [Annotated(dict(given)) for _ in pairs], {"policy_version": "base"}


async def test_equal_answers_have_no_margin_and_no_verdict_and_what_is_no_pair_stands_in_its_place():
    done = await do(Noisy(), READER, [ROWS[0], {"prompt": "p"}, ROWS[3], DataError("not JSON", where="line 4")])
    even = [one.columns and (one.columns["margin"], one.columns["label_agrees"]) for one in done.rows]
    assert even == [(1e-7, True), None, (0.0, None), None]
    assert done.rows[2].columns["margin_scaled"] is None
    assert [one.error for one in done.rows] == [None, "'chosen' is missing; the row has prompt", None, "not JSON"]
