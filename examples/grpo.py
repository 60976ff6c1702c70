"""GRPO with a reward that is read from inside the model: TRL's real trainer, and a served head as its reward.

    inward serve --model toy &
    python examples/grpo.py --model service/inward/models/toy/backbone --prompts prompts.jsonl --out out/grpo

The policy is trained against one head (``--head``, by default the service's hybrid one). ``--monitor`` names a second
head that nobody trains against: its reward is logged with weight 0. When the first rises and the second falls, the
policy has learnt to fool the head. Needs ``pip install ./clients/trainer``; ``--lora`` trains an adapter.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from inward_client import Inward, InwardError, rows
from inward_client.adapters.trl import InwardReward

LEAST_STEPS = 4
"""Of which two are the first and two the last quarter: a deviation needs two."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, and tells how the rewards of the first and of the last quarter of the steps compare."""
    parser = _arguments()
    args = parser.parse_args(argv)
    if args.steps < LEAST_STEPS:
        parser.error(f"--steps {args.steps}: at least {LEAST_STEPS}, or the first and the last quarter are the same")
    try:
        read = rows.collect(args.prompts, rows.read_prompt).values
        with Inward(args.url, timeout=args.timeout) as service:
            known = [head.name for head in service.heads()]
    except (rows.DataError, InwardError) as error:
        raise SystemExit(str(error)) from None
    prompts = [prompt for prompt in read if isinstance(prompt, str)]
    if not prompts:
        raise SystemExit(f"{args.prompts} has no prompts that are texts")
    if unknown := [head for head in (args.head, args.monitor) if head is not None and head not in known]:
        raise SystemExit(f"the service has no head {unknown[0]!r}: it has {', '.join(known)}")
    rewards = [InwardReward(args.url, head=args.head, timeout=args.timeout, name="reward")]
    if args.monitor:
        rewards.append(InwardReward(args.url, head=args.monitor, timeout=args.timeout, name="monitor"))
    config = GRPOConfig(
        str(args.out), max_steps=args.steps, learning_rate=args.learning_rate, seed=args.seed,
        per_device_train_batch_size=args.samples * args.prompts_per_step, num_generations=args.samples,
        max_completion_length=args.max_tokens, temperature=1.0, beta=args.beta, lr_scheduler_type="constant",
        reward_weights=[1.0, 0.0][: len(rewards)], logging_steps=1, save_strategy="no", report_to=args.report_to,
        bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM") if args.lora else None
    asked = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts]
    trainer = GRPOTrainer(
        str(args.model), rewards, args=config, train_dataset=Dataset.from_list(asked), peft_config=adapter
    )
    trainer.train()
    trainer.save_model(str(args.out / "final"))
    for reward in rewards:
        reward.close()
    steps = [line for line in trainer.state.log_history if "rewards/reward/mean" in line]
    (args.out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps), encoding="utf-8")
    told = {reward.__name__: _rise([line[f"rewards/{reward.__name__}/mean"] for line in steps]) for reward in rewards}
    print(json.dumps(told))
    return told


def _rise(means: Sequence[float]) -> dict[str, float]:
    """Mean reward in the first and in the last quarter of the steps, and the difference with a 95 % interval of its
    own (of the steps' means, by the normal distribution).
    """
    quarter = max(2, len(means) // 4)
    first, last = means[:quarter], means[-quarter:]
    error = math.sqrt(stdev(first) ** 2 / quarter + stdev(last) ** 2 / quarter)
    rise = fmean(last) - fmean(first)
    return {
        "first": fmean(first),
        "last": fmean(last),
        "rise": rise,
        "low": rise - 1.96 * error,
        "high": rise + 1.96 * error,
    }


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="of the service; default: %(default)s")
    parser.add_argument("--model", required=True, help="the policy: Hugging Face id or folder")
    parser.add_argument("--prompts", type=Path, required=True, help="a file of rows with prompts, in any layout")
    parser.add_argument("--out", type=Path, required=True, help="folder of the log and the result")
    parser.add_argument("--head", help="head that is the reward; by default the service's hybrid one")
    parser.add_argument("--monitor", help="head that is only logged")
    parser.add_argument("--steps", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--prompts-per-step", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=8, help="of each prompt; default: %(default)s")
    parser.add_argument("--max-tokens", type=int, default=128, help="of a sample; default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=1e-5, help="default: %(default)s")
    parser.add_argument(
        "--beta", type=float, default=0.0, help="weight of the KL to the reference; default: %(default)s"
    )
    parser.add_argument("--lora", action="store_true", help="train an adapter instead of all weights")
    parser.add_argument("--report-to", default="none", help="wandb, trackio, mlflow …; default: %(default)s")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one request; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return parser


if __name__ == "__main__":
    main()
