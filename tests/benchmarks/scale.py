"""What the fits cost: time and peak memory for more and more pairs, each fit in a process of its own.

    python tests/benchmarks/scale.py --out out/scale [--sizes 500 2000 8000 32000] [--wide]

States are drawn (a weak direction in each layer, shared prompts, correlated noise) into a file in the shape of
SmolLM2, 30 layers of 576, and with ``--wide`` 2,000 pairs of 32 layers of 4,096, Llama-2-7B's. Seconds are of the fit,
files opened; processor seconds say the same on a busy machine. What is done is kept in ``--out``, so that a run that
was stopped goes on. The last lines of the table are worked out: 83,000 pairs on Llama-2-7B, by the time that a pair
took in the wide run (fits are linear in pairs but for the solves, so that this is too much rather than too little).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from inward.offline.fit.hybrid import fit_hybrid
from inward.offline.fit.legend import fit_legend
from inward.offline.fit.whitened import FromStates, fit_whitened
from inward.offline.states.saved import Origin
from inward.offline.states.stored import PairWriter, StoredPairs

SHAPE, WIDE = (30, 576), (32, 4096)
WIDE_PAIRS, PAPER_PAIRS = 2000, 83_000
FITS = ("legend", "whitened", "hybrid")
PER_PROMPT = 5
RANK = 64
"""Of the noise that dimensions share."""
SIGNAL = 0.02


def draw(path: Path, pairs: int, shape: tuple[int, int]) -> None:
    """States of so many pairs, written as ``inward fit --save-states`` writes them."""
    layers, width = shape
    rng = np.random.default_rng(0)
    direction_LD = rng.standard_normal(shape, dtype=np.float32) / width**0.5
    scale_LD = np.exp(rng.standard_normal(shape, dtype=np.float32))
    mix_KD = rng.standard_normal((RANK, width), dtype=np.float32) / RANK**0.5
    writer = PairWriter(
        path,
        (pairs, layers, width),
        layers=range(1, layers + 1),
        groups_N=np.arange(pairs) // PER_PROMPT,
        length_difference_N=np.zeros(pairs),
        origin=Origin("eos", template="t", data_hash=path.stem),
    )
    prompt_LD = np.zeros(shape, dtype=np.float32)
    for pair in range(pairs):
        if pair % PER_PROMPT == 0:
            prompt_LD = rng.standard_normal(shape, dtype=np.float32)
        for chosen in (True, False):
            shared_LD = rng.standard_normal((layers, RANK), dtype=np.float32) @ mix_KD
            own_LD = rng.standard_normal(shape, dtype=np.float32)
            sign = SIGNAL * width**0.5 if chosen else -SIGNAL * width**0.5
            writer.put(pair, chosen=chosen, states_LD=(prompt_LD + shared_LD + own_LD + sign * direction_LD) * scale_LD)
    writer.close()


def fit(kind: str, path: Path) -> dict[str, Any]:
    """One fit, in this process."""
    imported = _peak_mib()
    wall, spent = time.monotonic(), time.process_time()
    states = StoredPairs.open(path)
    if kind == "legend":
        _, report = fit_legend(states, layer="sweep")
        accuracy = report.held_out
    elif kind == "whitened":
        _, said = fit_whitened(FromStates.of(states), layer="sum")
        accuracy = said.held_out
    else:
        accuracy = fit_hybrid(states, progress=False)[1].accuracy
    return {
        "seconds": time.monotonic() - wall,
        "processor_seconds": time.process_time() - spent,
        "peak_mib": _peak_mib(),
        "imports_mib": imported,
        "accuracy": float(accuracy),
    }


def _peak_mib() -> float:
    """Of this process; getrusage counts what its parent held before the start."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| fit | pairs | layers × width | seconds | processor seconds | ms a pair | peak memory |",
        "|" + "---|" * 7,
    ]
    for row in rows:
        cells = (
            row["fit"],
            f"{row['pairs']:,}",
            f"{row['layers']} × {row['width']:,}",
            f"{row['seconds']:.1f}",
            f"{row['processor_seconds']:.1f}",
            f"{1e3 * row['processor_seconds'] / row['pairs']:.2f}",
            f"{row['peak_mib']:,.0f} MiB",
        )
        lines.append(f"| {' | '.join(cells)} |")
    for row in rows:
        if row["width"] == WIDE[1]:
            hours = row["processor_seconds"] * PAPER_PAIRS / row["pairs"] / 3600
            lines.append(f"| {row['fit']}, worked out | {PAPER_PAIRS:,} | 32 × 4,096 | | {3600 * hours:,.0f} | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/scale"))
    parser.add_argument("--sizes", type=int, nargs="*", default=[500, 2000, 8000, 32000])
    parser.add_argument("--fits", nargs="+", choices=FITS, default=FITS)
    parser.add_argument("--wide", action="store_true", help="also 2,000 pairs of 32 layers of 4,096")
    parser.add_argument("--keep", action="store_true", help="keep the drawn states")
    parser.add_argument("--one", nargs=2, metavar=("FIT", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(fit(args.one[0], Path(args.one[1]))))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    plan = [(pairs, SHAPE) for pairs in args.sizes] + ([(WIDE_PAIRS, WIDE)] if args.wide else [])
    rows = []
    for pairs, (layers, width) in plan:
        states = args.out / f"{pairs}-{layers}-{width}.safetensors"
        for kind in args.fits:
            kept = states.with_name(f"{kind}-{states.stem}.json")
            if not kept.is_file():
                if not states.is_file():
                    draw(states, pairs, (layers, width))
                command = [sys.executable, __file__, "--one", kind, str(states)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                said = json.loads(done.stdout.splitlines()[-1])
                kept.write_text(json.dumps({"fit": kind, "pairs": pairs, "layers": layers, "width": width, **said}))
            rows.append(json.loads(kept.read_text()))
            print(rows[-1], file=sys.stderr, flush=True)
        if not args.keep:
            states.unlink(missing_ok=True)
    print(table(rows))


if __name__ == "__main__":
    main()
