"""One line per event, as JSON or as plain text; never the text of a prompt.

An event has a name and fields. Exceptions are logged by type and place only, because their messages may quote what was
sent.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

QUIET = ("uvicorn.access", "httpx", "httpcore", "urllib3", "filelock")
"""Loggers whose chatter repeats what our own events say."""

FRAMES = 8
"""Of an exception that are logged."""


def logger(name: str) -> logging.Logger:
    """The logger of one part of the house, such as ``inward.worker``."""
    return logging.getLogger(f"inward.{name}")


def event(
    logger: logging.Logger,
    name: str,
    *,
    severity: int = logging.INFO,
    error: BaseException | None = None,
    **fields: Any,
) -> None:
    """Logs one event. ``fields`` hold names, numbers and short codes; what isn't JSON is written as its ``str``. Of
    ``error``, a defect of ours, the type and the frames are told.
    """
    if logger.isEnabledFor(severity):
        logger.log(severity, name, exc_info=error, extra={"fields": fields})


def configure(level: str = "info", json: bool = True, stream: IO[str] | None = None) -> None:
    """Sends every event of at least ``level`` to ``stream`` (standard error), one line each. Calling it again replaces
    the set-up.

    Run uvicorn with ``log_config=None``, so that its messages come this way too; its access log is replaced by the
    event ``request``.
    """
    handler = _handler(json, stream)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("inward", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())
    logging.getLogger("inward.audit").setLevel(logging.INFO)  # what keys asked for is no chatter
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


def configure_own(level: str, json: bool) -> None:
    """``configure`` for a process that is somebody else's: their loggers stay as they are."""
    own = logging.getLogger("inward")
    own.handlers[:] = [_handler(json)]
    own.propagate = False
    own.setLevel(level.upper())
    logging.getLogger("inward.audit").setLevel(logging.INFO)


def _handler(json: bool, stream: IO[str] | None = None) -> logging.Handler:
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines() if json else TextLines())
    return handler


class JsonLines(logging.Formatter):
    """``{"ts", "level", "event", "logger", …fields}``; ASCII only, so that no text can break a line or an encoding."""

    def format(self, record: logging.LogRecord) -> str:
        """One line without a line break."""
        head = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "logger": record.name,
        }
        return json.dumps(head | _fields(record), default=str)


class TextLines(logging.Formatter):
    """``12:00:00 info worker: event field=value``, for people."""

    def format(self, record: logging.LogRecord) -> str:
        """One line without a line break."""
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        fields = "".join(f" {key}={json.dumps(value, default=str)}" for key, value in _fields(record).items())
        message = record.getMessage().encode("ascii", "backslashreplace").decode().replace("\n", " | ")
        return f"{time} {record.levelname.lower()} {record.name.removeprefix('inward.')}: {message}{fields}"


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = dict(getattr(record, "fields", {}))
    if record.exc_info and record.exc_info[1]:
        error = record.exc_info[1]
        fields["exception"], fields["trace"] = type(error).__name__, _frames(error)
        if (cause := error.__cause__) is not None:
            fields["cause"], fields["cause_trace"] = type(cause).__name__, _frames(cause)
    return fields


def _frames(error: BaseException) -> list[str]:
    """The innermost ones, as ``file.function:line``: no line of source, no value."""
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
    return [f"{Path(frame.filename).stem}.{frame.name}:{frame.lineno}" for frame in frames]
