"""``inward-train rm``: TRL's RewardTrainer with LEGEND's margins (arXiv 2406.08124), loss ``-log sigmoid(r_c - r_r -
m)``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from inward_trainer.durable import write_text
from inward_trainer.errors import DataError, OptionsError
from inward_trainer.models import arguments, checkpoints, load_tokenizer, lora, weights_dtype
from inward_trainer.options import RewardOptions
from inward_trainer.pairs import ScoredPair, read_row
from inward_trainer.service import Service
from inward_trainer.sources.rows import read_table
from inward_trainer.tokens import Tokeniser


def run(options: RewardOptions) -> int:
    """Trains a reward model and measures it on held-out pairs; started again, it goes on from its last checkpoint.

    Raises:
        TrainerError: see the tree.
    """
    if options.pairs is None:
        raise OptionsError("--pairs: say what to train on")
    tokeniser = Tokeniser(load_tokenizer(options), options.template)
    table = read_table(options.pairs)
    rows = [(read_row(row, str(i)), row.get("margin")) for i, row in enumerate(table)]
    pairs, margins = _with_margins(options, [pair for pair, _ in rows], [margin for _, margin in rows])
    dataset = [
        {"chosen_ids": chosen, "rejected_ids": rejected} | ({} if margin is None else {"margin": margin})
        for (chosen, rejected), margin in zip((_texts(tokeniser, pair) for pair in pairs), margins, strict=True)
        if max(len(chosen), len(rejected)) <= options.max_length
    ]
    trainer = _trainer(options, tokeniser, dataset)
    kept = list(checkpoints(options).glob("checkpoint-*/trainer_state.json"))
    trainer.train(resume_from_checkpoint=bool(kept))
    trainer.save_model(str(options.out / "final"))
    tokeniser.tokenizer.save_pretrained(options.out / "final")
    report: dict[str, Any] = {"pairs": len(dataset), "margins": options.margins}
    if options.held_out is not None:
        held_out = [_texts(tokeniser, read_row(row, str(i))) for i, row in enumerate(read_table(options.held_out))]
        report |= {"held_out_pairs": len(held_out), "held_out_accuracy": accuracy(trainer.model.eval(), held_out)}
    write_text(options.out / "report.json", json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))
    return 0


@torch.inference_mode()
def accuracy(model: Any, pairs: Sequence[tuple[list[int], list[int]]]) -> float:
    """Share of pairs whose chosen answer has the higher reward; one text at a time, so that no padding can matter."""
    right = 0
    for texts in pairs:
        chosen, rejected = (model(torch.tensor([ids], device=model.device)).logits.item() for ids in texts)
        right += chosen > rejected
    return right / len(pairs)


def _with_margins(
    options: RewardOptions, pairs: list[ScoredPair], column: list[Any]
) -> tuple[list[ScoredPair], list[float] | list[None]]:
    """The pairs that are trained on, and the margin of each."""
    if options.margins == "none" and not options.drop_disagreeing:
        return pairs, [None] * len(pairs)
    if options.margins == "column" and not options.drop_disagreeing:
        if any(margin is None for margin in column):
            raise DataError("--margins column: a row has no `margin`")
        return pairs, [float(margin) for margin in column]
    if options.url is None:
        raise OptionsError(f"--margins {options.margins} asks the service: give --url")
    key = options.api_key.get_secret_value() if options.api_key else None
    with Service(options.url, api_key=key, patience=options.patience, at_once=options.at_once) as service:
        found = service.margins(pairs, options.head)
    kept = [
        (pair, margin, own)
        for pair, margin, own in zip(pairs, found, column, strict=True)
        if not margin.get("error") and (margin["label_agrees"] or not options.drop_disagreeing)
    ]
    if not kept:
        raise DataError("no pair is left to train on")
    pairs = [pair for pair, _, _ in kept]
    if options.margins == "none":
        return pairs, [None] * len(pairs)
    if options.margins == "column":
        return pairs, [float(own) for _, _, own in kept]
    numbers = [float(margin["bin" if options.margins == "constant" else options.margins]) for _, margin, _ in kept]
    return pairs, [fmean(numbers)] * len(numbers) if options.margins == "constant" else numbers


def _texts(tokeniser: Tokeniser, pair: ScoredPair) -> tuple[list[int], list[int]]:
    tokens = tokeniser(pair)
    return tokens.prompt_ids + tokens.chosen_ids, tokens.prompt_ids + tokens.rejected_ids


def _trainer(options: RewardOptions, tokeniser: Tokeniser, dataset: list[dict[str, Any]]) -> Any:
    if not dataset:
        raise DataError("no pair is left to train on")
    model = AutoModelForSequenceClassification.from_pretrained(
        options.model, revision=options.revision, num_labels=1, dtype=weights_dtype(options)
    )
    length = {"max_steps": options.steps} if options.steps else {"num_train_epochs": options.epochs}
    config = RewardConfig(**arguments(options, save_strategy="steps", save_steps=options.checkpoint_every, **length))
    return RewardTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(dataset),
        processing_class=tokeniser.tokenizer,
        peft_config=lora(options, "SEQ_CLS"),
    )
