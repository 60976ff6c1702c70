"""Real TRL trainers, one step each, with rewards and margins from a live server; the policy is the demonstration
backbone."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("trl", reason="TRL is not installed: pip install ./clients/trainer")

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from inward.processes.wiring import TOY
from inward_client import Inward
from inward_client.adapters.trl import AsyncInwardReward, InwardReward, with_margins

PROMPTS = ["How do I sharpen a knife?", "Tell me about the sea."]
QUIET = {
    "report_to": "none", "use_cpu": True, "bf16": False, "max_steps": 1, "logging_steps": 1, "save_strategy": "no",
    "disable_tqdm": True, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "gradient_checkpointing": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOY / "backbone")


def changed(before, model):
    return any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def copies(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_online_trainers_take_a_step_on_our_rewards(demo_server, tokenizer, tmp_path, method):
    """Messages and a coroutine for GRPO, texts and a plain function for RLOO."""
    chat = method == "GRPO"
    rewards = (AsyncInwardReward if chat else InwardReward)(demo_server.url, timeout=300, name="safety")
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": p}] if chat else p} for p in PROMPTS])
    config = getattr(trl, f"{method}Config")(
        str(tmp_path), num_generations=4, max_completion_length=8, temperature=1.5, seed=1, **QUIET
    )
    model = AutoModelForCausalLM.from_pretrained(TOY / "backbone", dtype=torch.float32)
    before = copies(model)
    trainer = getattr(trl, f"{method}Trainer")(
        model, rewards, args=config, train_dataset=dataset, processing_class=tokenizer
    )
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "rewards/safety/mean" in entry)
    assert logged["rewards/safety/std"] > 0
    assert logged["safety/unscored"] == 0
    assert changed(before, model)
    if chat:
        asyncio.run_coroutine_threadsafe(rewards.close(), trainer.async_loop).result(60)
    else:
        rewards.close()


def test_the_reward_trainer_subtracts_our_margin(demo_server, tokenizer, tmp_path):
    """Its loss is ``-log sigmoid(difference - margin)``, with the margins that the service gave."""
    pairs = [
        {
            "prompt": "How do I break into a house?",
            "chosen": "I can't help with that. It is a crime.",
            "rejected": "Break a window.",
        },
        {
            "prompt": "How do I hurt him?",
            "chosen": "Please talk to somebody first.",
            "rejected": "Hit him with a stick.",
        },
    ]
    with Inward(demo_server.url, timeout=300) as inward:
        dataset = with_margins(Dataset.from_list(pairs), inward, margin="margin_scaled")
    assert max(abs(margin) for margin in dataset["margin"]) > 0.1
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(TOY / "backbone", num_labels=1, dtype=torch.float32)
    config = trl.RewardConfig(str(tmp_path), max_length=128, seed=1, **QUIET)
    before = copies(model)
    trainer = trl.RewardTrainer(model, config, train_dataset=dataset, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    assert sorted(batch["margin"].tolist()) == pytest.approx(sorted(dataset["margin"]))
    with torch.no_grad():
        chosen, rejected = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1).chunk(2)
        loss = trainer.compute_loss(model, dict(batch)).item()
    by_hand = -torch.nn.functional.logsigmoid(chosen - rejected - batch["margin"]).mean().item()
    without = -torch.nn.functional.logsigmoid(chosen - rejected).mean().item()
    assert loss == pytest.approx(by_hand, abs=1e-4)
    assert loss != pytest.approx(without, abs=1e-3)
    trainer.train()
    assert changed(before, model)
