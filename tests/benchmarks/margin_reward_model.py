"""Does a margin help a reward model? TRL's RewardTrainer with and without the ``margin`` column that the service gives.

    inward serve &
    python tests/benchmarks/margin_reward_model.py --model service/inward/models/toy/backbone --pairs
    hh_harmless_pairs.jsonl --out result.json

Needs ``trl==1.16.*`` (which brings datasets and accelerate), the service running with a LEGEND head, and pairs with
``prompt``, ``chosen``, ``rejected``. A run of the default size takes some minutes on two cores. It is no part of the
tests.

Three ways, the same seeds: no margin; the service's ``bin`` (0 to 1) of each pair; and one number for all pairs, the
mean of the bins, which tells the information in a margin from its size alone. Prompts are split as for the
demonstration backbone, so the pairs that are judged were seen neither by that backbone nor by the reward model; what
the LEGEND head was fitted on is the server's business.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

WAYS = ("none", "margin", "constant")
SLICE = 64
"""Pairs in one request."""
Pair = dict[str, Any]


def main() -> None:
    args = _arguments()
    pairs = [json.loads(line) for line in args.pairs.read_text(encoding="utf-8").splitlines() if line.strip()]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    pairs = [pair for pair in pairs if _fits(tokenizer, pair, args.max_length)]
    train = [pair for pair in pairs if split_of(pair["prompt"]) == "train"][: args.train]
    test = [pair for pair in pairs if split_of(pair["prompt"]) == "test"][: args.test]
    margins, agreement = ask_margins(args.url, args.head, train)
    print(
        f"{len(train)} pairs to train on, {len(test)} to judge; margins: mean {statistics.mean(margins):.3f}, label "
        f"agrees {agreement:.3f}"
    )
    runs: dict[str, list[float]] = {way: [] for way in WAYS}
    for seed in args.seeds:
        for way in WAYS:
            accuracy = run(args, tokenizer, _with_margins(train, margins, way), test, seed)
            runs[way].append(accuracy)
            print(f"seed {seed}, {way}: accuracy {accuracy:.4f}", flush=True)
    summary = {
        way: {"mean": statistics.mean(a), "spread": statistics.stdev(a) if len(a) > 1 else None, "runs": a}
        for way, a in runs.items()
    }
    gained = [m - n for m, n in zip(runs["margin"], runs["none"], strict=True)]
    result = {
        "train": len(train),
        "test": len(test),
        "label_agreement": agreement,
        "margin_mean": statistics.mean(margins),
        "accuracy": summary,
        "gained_by_margin": {"mean": statistics.mean(gained), "runs": gained},
        "standard_error_of_one_accuracy": (0.25 / len(test)) ** 0.5,
    }
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def split_of(prompt: str) -> str:
    """As ``inward.offline.toy.split_of``, repeated so that this file needs nothing but TRL."""
    opening = prompt.split("\n\nAssistant:")[0].strip()
    bucket = int.from_bytes(hashlib.sha256(opening.encode()).digest()[:4], "big") % 100
    return "train" if bucket < 70 else "validation" if bucket < 85 else "test"


def ask_margins(url: str, head: str | None, pairs: list[Pair]) -> tuple[list[float], float]:
    """The ``bin`` of every pair from ``POST /margin``, and the share of labels that the head agrees with."""
    bins: list[float] = []
    agreed = 0
    for start in range(0, len(pairs), SLICE):
        rows = [{key: pair[key] for key in ("prompt", "chosen", "rejected")} for pair in pairs[start : start + SLICE]]
        body: dict[str, Any] = {"pairs": rows}
        if head:
            body["head"] = head
        request = urllib.request.Request(
            f"{url}/margin", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            for one in json.load(answer)["margins"]:
                bins.append(float(one["bin"]))
                agreed += bool(one["label_agrees"])
    return bins, agreed / len(pairs)


def run(args: argparse.Namespace, tokenizer: Any, train: list[Pair], test: list[Pair], seed: int) -> float:
    """Trains one reward model and returns its accuracy on the held-out pairs."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    with tempfile.TemporaryDirectory() as folder:
        config = RewardConfig(
            output_dir=folder, seed=seed, data_seed=seed, learning_rate=args.learning_rate,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size, max_length=args.max_length,
            use_cpu=not torch.cuda.is_available(), bf16=args.bf16,
            gradient_checkpointing=False, logging_strategy="no", save_strategy="no", report_to="none",
            disable_tqdm=True,
        )  # fmt: skip
        rows = Dataset.from_list([_row(pair) for pair in train])
        RewardTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer).train()
    return accuracy(model.eval(), tokenizer, test)


@torch.inference_mode()
def accuracy(model: Any, tokenizer: Any, pairs: list[Pair]) -> float:
    """Share of pairs whose chosen response has the higher reward; one text at a time, so that no padding can matter."""
    right = 0
    for pair in pairs:
        chosen, rejected = (
            model(torch.tensor([_ids(tokenizer, pair, side)])).logits.item() for side in ("chosen", "rejected")
        )
        right += chosen > rejected
    return right / len(pairs)


def _conversation(pair: Pair, side: str) -> list[dict[str, str]]:
    """As messages, so that TRL and the judgement below render it alike, with one BOS, by the model's chat template."""
    return [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[side]}]


def _row(pair: Pair) -> Pair:
    row = {side: _conversation(pair, side) for side in ("chosen", "rejected")}
    return row | {"margin": pair["margin"]} if "margin" in pair else row


def _ids(tokenizer: Any, pair: Pair, side: str) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(_conversation(pair, side), tokenize=True, return_dict=True)[
        "input_ids"
    ]
    return ids


def _with_margins(pairs: list[Pair], margins: list[float], way: str) -> list[Pair]:
    if way == "none":
        return pairs
    mean = statistics.mean(margins)
    return [{**pair, "margin": m if way == "margin" else mean} for pair, m in zip(pairs, margins, strict=True)]


def _fits(tokenizer: Any, pair: Pair, limit: int) -> bool:
    return all(len(_ids(tokenizer, pair, side)) <= limit for side in ("chosen", "rejected"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model that becomes the reward model")
    parser.add_argument("--pairs", type=Path, required=True, help="JSONL with prompt, chosen, rejected")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="of the service (default: %(default)s)")
    parser.add_argument("--head", help="its LEGEND head (default: the service's choice)")
    parser.add_argument("--out", type=Path, help="also write the result as JSON")
    parser.add_argument("--train", type=int, default=800, help="pairs to train on, at most (default: %(default)s)")
    parser.add_argument("--test", type=int, default=400, help="pairs to judge, at most (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=384, help="longer pairs are left out (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="default: %(default)s")
    parser.add_argument("--epochs", type=float, default=1, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=16, help="default: %(default)s")
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=True, help="multiply in bfloat16 (default: yes)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    return parser.parse_args()


if __name__ == "__main__":
    main()
