"""``inward``: serve, api, worker, fit, evaluate, annotate, bench, heads, keys, info, dead-letters, completion."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from inward.commands.parser import parse
from inward.errors import InwardError

EXTRAS = {"vllm": "vllm", "ray": "ray", "opentelemetry": "otel", "shtab": "completion"}
"""Package → the extra that brings it; what an API replica does without is in ``standard``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; errors that a user can mend are one line on standard error and exit status 2."""
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


if __name__ == "__main__":
    sys.exit(main())
