"""One line per event, whatever is in it."""

from __future__ import annotations

import io
import json
import logging

import pytest

from inward import logs


@pytest.fixture(autouse=True)
def _logging_as_it_was():
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before


def lines(level: str = "info", as_json: bool = True, *, event=lambda log: None) -> list[str]:
    stream = io.StringIO()
    logs.configure(level, as_json, stream)
    event(logs.logger("test"))
    return stream.getvalue().splitlines()


def test_an_event_is_one_json_line_with_its_fields():
    (line,) = lines(event=lambda log: logs.event(log, "started", port=8080, name_="a\nb"))
    assert json.loads(line) | {"ts": ""} == {
        "ts": "", "level": "info", "event": "started", "logger": "inward.test", "port": 8080, "name_": "a\nb",
    }  # fmt: skip


@pytest.mark.parametrize("as_json", [True, False])
def test_half_a_surrogate_pair_and_odd_values_do_not_break_a_line(as_json):
    (line,) = lines(as_json=as_json, event=lambda log: logs.event(log, "odd\n\ud800", text="\ud800\n", thing=object))
    line.encode()


@pytest.mark.parametrize("as_json", [True, False])
def test_an_exception_is_told_by_type_and_place_and_not_by_its_message(as_json):
    def fail(log):
        try:
            raise ValueError("what somebody wrote")
        except ValueError:
            log.exception("failed")

    (line,) = lines(as_json=as_json, event=fail)
    assert "ValueError" in line and "fail:" in line
    assert "somebody" not in line


def test_events_below_the_level_are_not_written():
    assert lines("warning", event=lambda log: logs.event(log, "started")) == []
    assert len(lines("warning", event=lambda log: logs.event(log, "late", severity=logging.WARNING))) == 1


def test_uvicorns_access_log_is_silent_and_its_other_messages_are_not():
    def uvicorn(log):
        logging.getLogger("uvicorn.access").info("GET /")
        logging.getLogger("uvicorn.error").info("Started")

    (line,) = lines(event=uvicorn)
    assert json.loads(line)["event"] == "Started"


def test_in_somebody_elses_process_only_our_own_loggers_are_changed(capsys):
    root, own = logging.getLogger(), logging.getLogger("inward")
    theirs, before = (root.handlers[:], root.level), (own.handlers[:], own.propagate, own.level)
    try:
        logs.configure_own("warning", json=False)
        logs.event(logs.logger("test"), "chatter")
        logs.event(logs.logger("test"), "odd", severity=logging.WARNING, port=8080)
        assert capsys.readouterr().err.endswith(" warning test: odd port=8080\n")
        assert (root.handlers, root.level) == theirs
    finally:
        (own.handlers[:], own.propagate), _ = before[:2], own.setLevel(before[2])
