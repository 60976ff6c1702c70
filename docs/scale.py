"""The capacity model of ``scale.md``: how many workers, API replicas and Redis servers a rate of pairs needs.

    python docs/scale.py                          the tables of the document
    python docs/scale.py --rate 5000 --tokens 900 --worker 20000

Every number that goes in is measured (``MEASURED``, with the command) or is said to be assumed.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """What one pair costs Redis: ``python tests/benchmarks/redis_cost.py --pairs 20000``, Redis 6.2 with an
    append-only file.
    """

    cpu_us: float
    """Processor time of the redis-server, on its one thread."""
    commands: float
    """Those that scripts call are counted too."""
    bytes_in: int
    bytes_out: int


MEASURED = {
    "`/margin`, 1 pair a request": Pair(188, 22, 2544, 2143),
    "`/margin`, 4 pairs a request": Pair(133, 19, 2253, 2128),
    "`/margin`, 64 pairs a request": Pair(97, 17, 2192, 2123),
    "bulk job, with a `scores` stream": Pair(97 + 30, 17 + 1, 2192 + 1958, 2123 + 567),
}
WAITING_BYTES = 1504
"""Memory of a pair of 256 tokens that waits."""
BULK_BYTES = 1357
"""Memory of a row of a bulk job (1,178 bytes of JSON) and of what is streamed of it."""
TOKENS = 256
"""Of a pair in the measurements of Redis."""
API_PAIRS = 500
"""Pairs/s of one API replica: ``tests/benchmarks/queue_overhead.py``, one API, one worker and the callers on two
cores. On a better day of the same machine it was 1,000."""
BUSY = 0.7
"""How busy anything is planned to be; what is left is for bursts, for a restart, and for the death of a neighbour."""
BACKLOG = 60.0
"""Seconds of work that may wait."""
TARGETS = {"1 million an hour": 1e6 / 3600, "1 billion a day": 1e9 / 86400}
WORKERS = {
    "0.5B on two CPU cores (measured)": 1069,
    "the toy on two CPU cores (measured)": 25000,
    "8B on a GPU of 990 TFLOP/s, of which 40 % are reached (assumed)": round(0.4 * 990e12 / (2 * 8e9), -3),
}
"""Needed tokens/s of one worker; the measured ones are in BENCHMARKS.md."""


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ceiling() -> str:
    """Where one Redis stops."""
    rows = []
    for name, pair in MEASURED.items():
        rate = BUSY * 1e6 / pair.cpu_us
        megabits = 8 * rate * (pair.bytes_in + pair.bytes_out) / 1e6
        cost = [f"{pair.cpu_us:,.0f} µs", f"{pair.commands:.0f}", f"{(pair.bytes_in + pair.bytes_out) / 1000:.1f} kB"]
        rows.append([name, *cost, f"{rate:,.0f}", f"{rate * 86400 / 1e6:,.0f} million", f"{megabits:,.0f} Mbit/s"])
    return table(["", "processor", "commands", "network", f"pairs/s at {BUSY:.0%}", "a day", "network then"], rows)


def redis() -> str:
    """How much Redis each target needs."""
    rows = []
    for target, rate in TARGETS.items():
        for name, pair in MEASURED.items():
            load = rate * pair.cpu_us / 1e6
            megabits = 8 * rate * (pair.bytes_in + pair.bytes_out) / 1e6
            cells = [
                f"{rate:,.0f}",
                f"{load:.2f}",
                f"**{math.ceil(load / BUSY)}**",
                f"{rate * pair.commands:,.0f}",
                f"{megabits:,.0f} Mbit/s",
            ]
            rows.append([target, name, *cells, f"{rate * BACKLOG * WAITING_BYTES / 1e9:.2f} GB"])
    header = [
        "target",
        "sent as",
        "pairs/s",
        "busy threads",
        "Redis servers",
        "commands/s",
        "network",
        f"{BACKLOG:.0f} s of backlog",
    ]
    return table(header, rows)


def processes(tokens: int = TOKENS) -> str:
    """Workers and API replicas for each target."""
    rows = []
    for target, rate in TARGETS.items():
        rows.append(
            [
                target,
                f"{math.ceil(rate / API_PAIRS / BUSY):,}",
                *(f"{workers(rate, tokens, speed):,}" for speed in WORKERS.values()),
            ]
        )
    return table(["target", "API replicas", *(f"workers: {name}" for name in WORKERS)], rows)


def workers(rate: float, tokens: int, speed: float) -> int:
    """How many are needed: Little's law says how many pairs are inside, and a worker is as good as its tokens/s."""
    return math.ceil(rate * tokens / speed / BUSY)


TABLES = {"ceiling": ceiling, "redis": redis, "processes": processes}


def main() -> None:
    """Prints the tables, or the answer for one rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, help="pairs/s")
    parser.add_argument(
        "--tokens", type=int, default=TOKENS, help="needed tokens of a pair: its prompt once, and both answers"
    )
    parser.add_argument("--worker", type=float, default=25000, help="tokens/s of a worker: inward bench measures yours")
    args = parser.parse_args()
    if args.rate is None:
        print("\n\n".join(f"{name}\n\n{make()}" for name, make in TABLES.items()))
        return
    worst = max(MEASURED.values(), key=lambda pair: pair.cpu_us)
    print(f"workers        {workers(args.rate, args.tokens, args.worker):,}")
    print(f"API replicas   {math.ceil(args.rate / API_PAIRS / BUSY):,}")
    print(
        f"Redis servers  {math.ceil(args.rate * worst.cpu_us / 1e6 / BUSY):,}   (requests of one pair, the dearest way)"
    )


if __name__ == "__main__":
    main()
