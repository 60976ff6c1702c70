"""The method in TRL's real trainer, on a tiny random model."""

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from inward_trainer.trainer import CdpoTrainer
from support.tiny_tokenizer import of_transformers as tokenizer

ROWS = [
    {"prompt": "What is the tallest tree?", "chosen": " The coast redwood.", "rejected": " I counted seven birds."},
    {
        "prompt": "How does a lock work?",
        "chosen": " Step by step, with boats.",
        "rejected": " She lay still that morning in the harbour.",
    },
    {"prompt": "Birds?", "chosen": " Two crows.", "rejected": " Five starlings on the wire."},
    {"prompt": "Boats?", "chosen": " The harbour was quiet.", "rejected": " No."},
]


def model():
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def trained(kind, folder, rows, *, steps=3, seen=None, **options):
    """The trainer after some steps, and the losses that it logged."""
    config = DPOConfig(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
        dataloader_pin_memory=False, beta=0.5, seed=0, **options,
    )  # fmt: skip
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = kind(
        model=model(),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(chat=False),
        peft_config=adapter,
    )
    trainer.train()
    return trainer, [line for line in trainer.state.log_history if "loss" in line]


def with_confidence(*gammas):
    return [row | {"confidence": gamma} for row, gamma in zip(ROWS, gammas, strict=True)]


@pytest.fixture(scope="module")
def dpo(tmp_path_factory):
    return trained(DPOTrainer, tmp_path_factory.mktemp("dpo"), ROWS)[1]


def test_confidence_one_gives_trls_dpo_loss_exactly(dpo, tmp_path):
    _, ours = trained(CdpoTrainer, tmp_path, with_confidence(1.0, 1.0, 1.0, 1.0))
    for theirs, line in zip(dpo, ours, strict=True):
        for name in (
            "loss",
            "grad_norm",
            "rewards/margins",
            "rewards/accuracies",
            "rewards/chosen",
            "rewards/rejected",
        ):
            assert line[name] == theirs[name], name
    assert len({line["loss"] for line in ours}) == 3, "it learns"


def test_without_a_column_it_is_dpo(dpo, tmp_path):
    _, ours = trained(CdpoTrainer, tmp_path, ROWS)
    assert [line["loss"] for line in ours] == [line["loss"] for line in dpo]


def test_each_rows_confidence_changes_the_loss(dpo, tmp_path):
    _, ours = trained(CdpoTrainer, tmp_path, with_confidence(0.6, 0.9, 1.0, 0.5))
    assert ours[0]["loss"] == pytest.approx(dpo[0]["loss"]), "at z = 0 every confidence costs log 2"
    assert ours[0]["grad_norm"] < dpo[0]["grad_norm"]
    assert ours[1]["loss"] != dpo[1]["loss"]
    assert ours[0]["gamma"] == pytest.approx(0.75)


def test_labels_that_are_surely_wrong_are_learnt_the_other_way_round(tmp_path):
    _, ours = trained(CdpoTrainer, tmp_path, with_confidence(0.0, 0.0, 0.0, 0.0))
    assert ours[-1]["rewards/margins"] < 0


def test_logs_what_heads_say_of_the_pairs(tmp_path):
    scores = ({"chosen_score": 2.0, "rejected_score": 1.0}, {"chosen_score": 0.0, "rejected_score": 3.0}, {}, {})
    rows = [
        row | {"monitor_chosen": 1.0, "monitor_rejected": 0.0} | more for row, more in zip(ROWS, scores, strict=True)
    ]
    _, [line] = trained(CdpoTrainer, tmp_path, rows, steps=1)
    assert line["hybrid/accuracy"] == 0.5
    assert line["monitor/accuracy"] == 1.0
    assert line["hybrid/reward/mean"] == 1.5
    assert line["log_ratio"] == 0.0


@pytest.mark.parametrize(
    "option", [{"label_smoothing": 0.1}, {"loss_type": ["ipo"]}, {"precompute_ref_log_probs": True}]
)
def test_options_that_it_would_ignore_are_refused(tmp_path, option):
    with pytest.raises(ValueError, match="loss of its own"):
        trained(CdpoTrainer, tmp_path, ROWS, **option)


def test_divergence_is_zero_at_first_and_what_the_tokens_distributions_say_on_average(tmp_path):
    """Many draws of the trained policy: k3 averages to the exact sum of the tokens' divergences."""
    trainer, _ = trained(CdpoTrainer, tmp_path / "first", ROWS, steps=1)
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.zero_()
    row = {"prompt_ids": [2, 3], "chosen_ids": [5, 6, 1], "rejected_ids": [5]}
    assert trainer.divergence([row]) == [0.0]
    trainer, _ = trained(CdpoTrainer, tmp_path / "second", ROWS, steps=4)
    policy = trainer.model.eval()
    prompt, drawn, exact = torch.tensor([[2, 3]]), [], []
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(150):
            ids, total = prompt, 0.0
            for _ in range(3):
                ours = policy(ids).logits[0, -1].log_softmax(-1)
                with policy.disable_adapter():
                    theirs = policy(ids).logits[0, -1].log_softmax(-1)
                total += float((ours.exp() * (ours - theirs)).sum())
                ids = torch.cat([ids, torch.multinomial(ours.exp(), 1)[None]], dim=1)
            drawn.append({"prompt_ids": [2, 3], "chosen_ids": ids[0, 2:].tolist(), "rejected_ids": [5]})
            exact.append(total)
    found = trainer.divergence(drawn)
    assert min(found) >= 0
    error = torch.tensor(found).std() / len(found) ** 0.5
    assert sum(found) / len(found) == pytest.approx(sum(exact) / len(exact), abs=float(4 * error))
    assert sum(exact) / len(exact) > 10 * error
