"""What correction buys: a reward model trained on pairs of which some labels were turned round, and on what is made of
them.

    inward annotate pairs.jsonl annotated.jsonl --head hybrid
    python tests/benchmarks/corrected_labels.py --annotated annotated.jsonl --model FOLDER --out out.json

The reward model is TRL's (RewardTrainer on ``--model``; needs ``trl==1.16.*``), or with ``--states`` a linear one on
the saved states of the same pairs, trained with the same loss, which takes seconds. Training sets: the noisy pairs as
they are, without those that the head contradicts, without the tenth with the lowest margins, with all that it
contradicts turned round (which are the head's labels, whatever the given ones were), with margins (a quarter of the
agreeing pairs each 0, 1/3, 2/3, 1; 0 where the head contradicts), and the clean ones. Judged on clean pairs of other
prompts, as is the head itself. Each run is written down when it is done and found again. It is no part of the tests.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from planted_flips import planted

from inward.offline.states.saved import PairStates, load_states

Pair = dict[str, Any]
Judge = Callable[[list[Pair], list[Pair], int], float]
"""Accuracy on the second pairs of what was trained on the first, with a seed."""
WAYS = ("noisy", "dropped", "tenth_dropped", "flipped", "margins", "clean")


def main() -> None:
    args = _arguments()
    pairs = [json.loads(line) for line in args.annotated.read_text(encoding="utf-8").splitlines() if line.strip()]
    for row, pair in enumerate(pairs):
        pair["annotated"], pair["row"] = pair.pop("margin"), row  # what TRL takes under that name is another thing
    judge: Judge = on_states(args) if args.states else with_trl(args, pairs)
    train = [pair for pair in pairs if split_of(pair["prompt"]) == "train"][: args.train]
    test = [pair for pair in pairs if split_of(pair["prompt"]) != "train"][: args.test]
    done: dict[str, float] = json.loads(args.out.read_text()) if args.out.is_file() else {}
    alone = statistics.mean(pair["annotated"] > 0 for pair in test)
    print(f"{len(train)} pairs to train on, {len(test)} to judge; the head itself: {alone:.3f}")
    for seed in args.seeds:
        flips = planted(len(train), args.rate, seed)
        noisy = [turned(pair) if flip else pair for pair, flip in zip(train, flips, strict=True)]
        for way in args.ways:
            if (name := f"{way} {seed}") not in done:
                rows = made(way, noisy, train)
                done[name] = judge(rows, test, seed)
                args.out.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
                print(f"seed {seed}, {way}: {len(rows)} pairs, accuracy {done[name]:.4f}", flush=True)
    for way in args.ways:
        values = [done[f"{way} {seed}"] for seed in args.seeds]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"| {way} | {statistics.mean(values):.3f} ± {spread:.3f} |")
    print(f"standard error of one accuracy: {(0.25 / len(test)) ** 0.5:.3f}")


def with_trl(args: argparse.Namespace, pairs: list[Pair]) -> Judge:
    """TRL's reward model; pairs that are too long are left out of ``pairs``."""
    from margin_reward_model import run
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    pairs[:] = [pair for pair in pairs if _tokens(tokenizer, pair) <= args.max_length]
    return lambda rows, test, seed: run(args, tokenizer, [_plain(row) for row in rows], test, seed)


def on_states(args: argparse.Namespace) -> Judge:
    """A linear reward on the states of one layer, standardised: -log sigmoid(reward difference - margin), ridge."""
    from scipy.optimize import minimize

    states = load_states(args.states)
    assert isinstance(states, PairStates)
    axis = states.layers.index(args.layer)
    both = np.concatenate([states.chosen_NLD[:, axis], states.rejected_NLD[:, axis]])
    difference_ND = ((states.chosen_NLD[:, axis] - states.rejected_NLD[:, axis]) / both.std(axis=0)).astype(np.float64)

    def judge(rows: list[Pair], test: list[Pair], _: int) -> float:
        x_ND = np.array([difference_ND[row["row"]] * (-1 if row.get("turned") else 1) for row in rows])
        margin_N = np.array([row.get("margin", 0.0) for row in rows])

        def loss(w_D: Any) -> tuple[float, Any]:
            z_N = x_ND @ w_D - margin_N
            wrong_N = 1 / (1 + np.exp(np.clip(z_N, -700, 700)))
            value = np.logaddexp(0, -z_N).mean() + 0.5 * args.ridge * w_D @ w_D
            return float(value), -(x_ND * wrong_N[:, None]).mean(axis=0) + args.ridge * w_D

        w_D = minimize(loss, np.zeros(x_ND.shape[1]), jac=True, method="L-BFGS-B").x
        return float(np.mean([difference_ND[row["row"]] @ w_D > 0 for row in test]))

    return judge


def made(way: str, noisy: list[Pair], clean: list[Pair]) -> list[Pair]:
    """The training set of a way."""
    if way == "clean":
        return clean
    if way == "dropped":
        return [pair for pair in noisy if pair["annotated"] >= 0]
    if way == "tenth_dropped":
        least = np.quantile([pair["annotated"] for pair in noisy], 0.1)
        return [pair for pair in noisy if pair["annotated"] >= least]
    if way == "flipped":
        return [turned(pair) if pair["annotated"] < 0 else pair for pair in noisy]
    if way == "margins":
        edges = np.quantile([pair["annotated"] for pair in noisy if pair["annotated"] >= 0], [0.25, 0.5, 0.75])
        return [{**pair, "margin": float(np.searchsorted(edges, pair["annotated"])) / 3} for pair in noisy]
    return noisy


def turned(pair: Pair) -> Pair:
    """With the other label."""
    return {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"], "annotated": -pair["annotated"],
            "turned": not pair.get("turned", False)}  # fmt: skip


def split_of(prompt: str) -> str:
    """By a hash of the prompt."""
    bucket = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big") % 100
    return "train" if bucket < 70 else "test"


def _plain(pair: Pair) -> Pair:
    return {name: pair[name] for name in ("prompt", "chosen", "rejected", "margin") if name in pair}


def _tokens(tokenizer: Any, pair: Pair) -> int:
    texts = [pair["prompt"] + " " + pair[side] for side in ("chosen", "rejected")]
    return max(len(ids) for ids in tokenizer(texts)["input_ids"]) + 16


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotated", type=Path, required=True, help="JSONL with prompt, chosen, rejected and margin")
    parser.add_argument("--model", type=Path, help="folder of the model that becomes the reward model")
    parser.add_argument(
        "--states", type=Path, help="of the same pairs, in the same order: a linear reward on them instead"
    )
    parser.add_argument("--layer", type=int, default=15, help="of the states (default: %(default)s)")
    parser.add_argument("--ridge", type=float, default=0.03, help="of the linear reward (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rate", type=float, default=0.3, help="of labels turned round (default: %(default)s)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--train", type=int, default=800)
    parser.add_argument("--test", type=int, default=400)
    parser.add_argument("--max-length", type=int, default=256, help="longer pairs are left out (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser.parse_args()


if __name__ == "__main__":
    main()
