"""``inward annotate`` on whole files, beside LEGEND's published way (one text at a time, float32), on the same model in
one run.

    python tests/benchmarks/annotate.py PAIRS.jsonl [PAIRS.jsonl …] [--model smollm2] [--sample 400]
        [--ways published,bf16,killed,url,ray]

``published`` scores a random sample of the pairs; the others annotate all of them: ``here`` in one process, ``killed``
with kill -9 in the middle and the same command again, ``url`` at a running service, ``ray`` on Ray (needs it).
Prints one JSON object a line. Pairs are of the rows' ``prompt``, ``chosen``, ``rejected``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from inward.processes.wiring import find_model
from inward.settings import Settings
from support.serving import started

DTYPE = ("--dtype", "float32")


def command(source: Path, out: Path, *options: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "inward",
        "annotate",
        str(source),
        str(out),
        "--layout",
        "trl",
        "--truncate",
        "--json",
        *options,
    ]


def annotate(source: Path, out: Path, *options: str) -> dict[str, float]:
    """Seconds of the whole command, and pairs/s of the annotation proper (without loading and writing), as its bar
    says."""
    began = time.perf_counter()
    done = subprocess.run(command(source, out, *options), capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    rates = re.findall(r"\[(\d+):(\d+)<", done.stderr)
    minutes, rest = map(int, rates[-1])
    summary = json.loads(done.stdout)
    return {
        "seconds": seconds,
        "bar_seconds": 60 * minutes + rest,
        "rows": summary["rows"],
        "flipped": summary["flipped"],
    }


def killed(source: Path, out: Path) -> float:
    """Kills the command when about half of the rows are done; seconds until then."""
    began = time.perf_counter()
    process = subprocess.Popen(command(source, out, *DTYPE), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with source.open("rb") as lines:
        half = sum(1 for _ in lines) // 2
    done = out.with_name(out.name + ".progress") / "done.jsonl"
    while not done.is_file() or done.read_bytes().count(b'"margin":') < half:
        if process.poll() is not None:
            raise SystemExit("it ended before it could be killed")
        time.sleep(0.1)
    process.kill()
    process.wait()
    return time.perf_counter() - began


def margins(path: Path) -> list[float]:
    return [json.loads(line)["margin"] for line in path.read_text(encoding="utf-8").splitlines()]


def published(source: Path, sample: int) -> dict[str, float]:
    """In a process of its own, as ``inward bench`` runs it."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    chosen = random.Random(0).sample(rows, min(sample, len(rows)))
    code = (
        "import json,sys;from pathlib import Path;from inward.offline.bench import ways;from "
        "inward.offline.data.pairs import Pair;"
        "pairs=[Pair(*p) for p in json.load(sys.stdin)];model=Path(sys.argv[1]);"
        "print(ways.published(model,ways.grouped(model,pairs)))"
    )
    given = json.dumps([[row["prompt"], row["chosen"], row["rejected"]] for row in chosen])
    model = find_model(Settings(model=os.environ["INWARD_MODEL"])).folder
    done = subprocess.run(
        [sys.executable, "-c", code, str(model)], input=given, capture_output=True, text=True, check=True
    )
    return {"rows": len(chosen), "seconds": float(done.stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--sample", type=int, default=400)
    parser.add_argument("--limit", type=int, help="rows of each file")
    parser.add_argument("--ways", default="published,here,bf16,killed,url,ray")
    args = parser.parse_args()
    ways = args.ways.split(",")
    os.environ["INWARD_MODEL"] = args.model
    with tempfile.TemporaryDirectory(prefix="inward-annotate-") as name:
        folder = Path(name)
        os.environ["XDG_STATE_HOME"] = str(folder / "state")
        source = folder / "pairs.jsonl"
        rows = [
            line
            for path in args.pairs
            for line in path.read_text(encoding="utf-8").splitlines()[: args.limit]
            if line.strip()
        ]
        source.write_text("\n".join(rows) + "\n", encoding="utf-8")
        if "published" in ways:
            found = published(source, args.sample)
            print(json.dumps({"way": "published", **found, "pairs/s": found["rows"] / found["seconds"]}), flush=True)
        here = folder / "here.jsonl"
        found = annotate(source, here, *DTYPE)
        print(json.dumps({"way": "here", **found, "pairs/s": found["rows"] / found["seconds"]}), flush=True)
        if "bf16" in ways:
            found = annotate(source, folder / "bf16.jsonl")
            print(
                json.dumps({"way": "here, default dtype", **found, "pairs/s": found["rows"] / found["seconds"]}),
                flush=True,
            )
        if "killed" in ways:
            out = folder / "killed.jsonl"
            until = killed(source, out)
            found = annotate(source, out, *DTYPE)
            same = out.read_bytes() == here.read_bytes()
            print(json.dumps({"way": "killed", "killed_after": until, **found, "identical": same}), flush=True)
        for way in ("url", "ray"):
            if way not in ways:
                continue
            out = folder / f"{way}.jsonl"
            if way == "url":
                with started(*DTYPE) as served:
                    found = annotate(source, out, "--url", served.url)
            else:
                found = annotate(source, out, "--engine", "ray", *DTYPE)
            difference = max(abs(a - b) for a, b in zip(margins(here), margins(out), strict=True))
            print(json.dumps({"way": way, **found, "largest_difference": difference}), flush=True)


if __name__ == "__main__":
    main()
