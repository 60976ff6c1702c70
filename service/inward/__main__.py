"""``inward``: serve, api, worker, fit, evaluate, annotate, bench, heads, keys, info, dead-letters, completion."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Sequence

from inward.commands.parser import parse
from inward.errors import InwardError

EXTRAS = {"vllm": "vllm", "ray": "ray", "opentelemetry": "otel", "shtab": "completion"}
"""Package → the extra that brings it; what an API replica does without is in ``standard``."""


READER_LEFT = 141
"""Exit status where nobody reads our output any more, as a shell has it for those whom SIGPIPE ends."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; errors that a user can mend are one line on standard error and exit status 2."""
    try:
        try:
            return _run(argv)
        finally:
            print(end="", flush=True)  # Python would do it after us, and complain
    except BrokenPipeError:
        if not _reader_left():
            raise
        return READER_LEFT


def _run(argv: Sequence[str] | None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    command = f"inward {words[0]}" if words else "inward"
    try:
        args = parse(words)
        return int(args.run(args))
    except InwardError as error:
        print(f"{command}: {error.message}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or "inward").partition(".")[0]
        if package == "inward":
            raise  # a defect of ours
        extra = EXTRAS.get(package, "standard")
        print(f"{command}: {package} is not installed, and this needs it: install inward[{extra}]", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{command}: stopped", file=sys.stderr)
        return 130


def _reader_left() -> bool:
    """Whether what we print goes into a pipe that nobody reads, as before ``| head``; what is left to be printed goes
    nowhere then. Another pipe that broke is a defect.
    """
    pipes = select.poll()
    for descriptor in (1, 2):
        pipes.register(descriptor, 0)
    left = [descriptor for descriptor, event in pipes.poll(0) if event & (select.POLLERR | select.POLLHUP)]
    for descriptor in left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return bool(left)


if __name__ == "__main__":
    sys.exit(main())
