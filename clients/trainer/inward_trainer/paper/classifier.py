"""A judge: a sequence classifier of all weights, safe against unsafe. Its weights are measured with and never shipped:
they come from data whose licence forbids it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

from inward.backbones.transformers.packing import rectangles
from inward.types import Doubles
from inward_trainer.paper.batches import most_tokens, most_trained, padded
from inward_trainer.paper.descent import Descent, autocast
from inward_trainer.paper.language_model import reading_dtype
from inward_trainer.paper.texts import Text

BATCH = 64
"""Answers in one step of a judge's training."""
LEARNING_RATE = 5e-5


class Classifier:
    """One number for a text: a judge's logit, or a reward."""

    def __init__(self, model: Any, pad: int) -> None:
        self.model, self._pad = model.eval(), pad
        self.device = torch.device(model.device)

    @classmethod
    def load(cls, folder: Path, pad: int, device: torch.device) -> Classifier:
        """From a folder, for scoring."""
        return cls(open_classifier(folder, pad, reading_dtype(device)).to(device), pad)

    @torch.inference_mode()
    def scores(self, texts: Sequence[Text]) -> Doubles:
        """``[M]``. The last product is in float32, or many texts would score the same."""
        found = np.empty(len(texts))
        for part in rectangles([len(text.ids) for text in texts], most_tokens(self.device)):
            ids, mask = padded([texts[i].ids for i in part], self._pad, self.device)
            hidden = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            last = hidden[torch.arange(len(part), device=ids.device), mask.sum(dim=1) - 1]
            found[part] = (last.float() @ self.model.score.weight[0].float()).double().cpu().numpy()
        return found


def open_classifier(folder: Path, pad: int, dtype: torch.dtype) -> Any:
    """A model with one number on top, which is random where the folder has none."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=dtype)
    model.config.pad_token_id = pad
    return model


def train_judge(
    folder: Path, texts: Sequence[Text], safe: Sequence[bool], *, pad: int, device: torch.device, epochs: int, seed: int
) -> Any:
    """Trains all weights on labelled answers, by cross-entropy."""
    torch.manual_seed(seed)
    model = open_classifier(folder, pad, torch.float32).to(device).train()
    rng = np.random.default_rng(seed)
    order = [part for _ in range(epochs) for part in _batches(rng, [len(t.ids) for t in texts])]
    descent = Descent(model, lr=LEARNING_RATE, steps=len(order), weight_decay=0.01)
    label = torch.tensor(safe, dtype=torch.float32)
    for part in tqdm(order, desc="train the judge", unit="step"):
        for rows in rectangles([len(texts[i].ids) for i in part], most_trained(device)):
            places = [part[row] for row in rows]
            ids, mask = padded([texts[i].ids for i in places], pad, device)
            with autocast(device):
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0].float()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                logits, label[places].to(device), reduction="sum"
            )
            (loss / len(part)).backward()  # type: ignore[no-untyped-call]
        descent.step()
    return model.eval()


def _batches(rng: np.random.Generator, lengths: Sequence[int]) -> list[list[int]]:
    """All rows once: in random order, but texts of like length together, eight batches at a time."""
    order = rng.permutation(len(lengths)).tolist()
    batches = []
    for start in range(0, len(order), 8 * BATCH):
        part = sorted(order[start : start + 8 * BATCH], key=lengths.__getitem__)
        batches += [part[i : i + BATCH] for i in range(0, len(part), BATCH)]
    return [batches[i] for i in rng.permutation(len(batches))]
