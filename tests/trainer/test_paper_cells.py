"""Cells: made once, by one process, and told about if they can't be."""

import fcntl

import pytest

from inward_trainer.paper.cells import Cells, Missing, OutOfTime


def test_a_cell_is_made_once(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"value": 3}

    assert Cells(tmp_path).need("a", make)["value"] == 3
    assert Cells(tmp_path).need("a", make)["value"] == 3
    assert made == [1]


def test_one_that_fails_does_not_keep_the_others(tmp_path):
    def fail():
        raise ValueError("two\nlines")

    found = Cells(tmp_path).every({"a": fail, "b": lambda: {"value": 1}}, "cells")
    assert found["a"] == Missing("ValueError: two")
    assert found["b"]["value"] == 1
    assert Cells(tmp_path).every({"a": lambda: {"value": 2}}, "cells")["a"]["value"] == 2


def test_what_another_process_makes_comes_last(tmp_path):
    cells, order = Cells(tmp_path), []
    (tmp_path / "locks").mkdir()
    with (tmp_path / "locks/a.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def b():
            order.append("b")
            fcntl.flock(other, fcntl.LOCK_UN)
            return {}

        def a():
            order.append("a")
            return {}

        assert list(cells.every({"a": a, "b": b}, "cells")) == ["a", "b"]
    assert order == ["b", "a"]


def test_nothing_is_begun_when_time_is_up_but_what_is_there_is_found(tmp_path):
    Cells(tmp_path).need("there", lambda: {"value": 1})
    late = Cells(tmp_path, minutes=0)
    assert late.need("there", lambda: {})["value"] == 1
    with pytest.raises(OutOfTime, match="the same command goes on"):
        late.need("new", lambda: {})


def test_a_number_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        Cells(tmp_path).need("a", lambda: {"value": float("nan")})
    assert Cells(tmp_path).find("a") is None
