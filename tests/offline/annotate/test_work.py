import dataclasses
import os

import pytest

from inward.errors import SetupError
from inward.offline.annotate.asking import Annotated, Annotator
from inward.offline.annotate.work import Done, Progress, Task, identity
from inward.offline.data.files import Chunk, find
from inward.offline.data.layouts import LAYOUTS

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
        again.remove()
    assert list(tmp_path.iterdir()) == []


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
    task = Task(LAYOUTS["trl"], {}, False, None)

    def of(task=task, annotator=ANNOTATOR, limit=None):
        return identity(find(path), task, annotator, 256, limit)

    same = of()
    assert same == of()
    newer = {**ANNOTATOR.head, "version": 2}
    others = [
        of(dataclasses.replace(task, truncate=True)),
        of(dataclasses.replace(task, layout=LAYOUTS["hh"])),
        of(annotator=dataclasses.replace(ANNOTATOR, fingerprint="g")),
        of(annotator=dataclasses.replace(ANNOTATOR, head=newer)),
        of(limit=3),
    ]
    os.utime(path, ns=(1, 1))
    others.append(of())
    assert len({same, *others}) == 7
