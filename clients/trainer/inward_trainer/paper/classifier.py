"""A judge: a sequence classifier of all weights, safe against unsafe. Its weights are measured with and never shipped:
they come from data whose licence forbids it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

from inward_trainer.paper.batches import by_length, most_tokens, most_trained, padded
from inward_trainer.paper.language_model import reading_dtype
from inward_trainer.paper.texts import Text

Doubles = NDArray[np.float64]


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
        for part in by_length([len(text.ids) for text in texts], most_tokens(self.device)):
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


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Products in bfloat16 on a GPU, weights in float32."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def train_judge(
    folder: Path,
    texts: Sequence[Text],
    safe: Sequence[bool],
    *,
    pad: int,
    device: torch.device,
    epochs: int,
    seed: int,
    batch: int = 64,
    lr: float = 5e-5,
) -> Any:
    """Trains all weights on labelled answers, by cross-entropy, with AdamW, warm-up and a linear fall."""
    torch.manual_seed(seed)
    model = open_classifier(folder, pad, torch.float32).to(device).train()
    rng = np.random.default_rng(seed)
    order = [part for _ in range(epochs) for part in _batches(rng, [len(t.ids) for t in texts], batch)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    warmup = max(1, len(order) // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (len(order) - step) / max(1, len(order) - warmup))
    )
    label = torch.tensor(safe, dtype=torch.float32)
    for part in tqdm(order, desc="train the judge", unit="step"):
        micro = list(by_length([len(texts[i].ids) for i in part], most_trained(device)))
        for rows in micro:
            places = [part[row] for row in rows]
            ids, mask = padded([texts[i].ids for i in places], pad, device)
            with autocast(device):
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0].float()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                logits, label[places].to(device), reduction="sum"
            )
            (loss / len(part)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def _batches(rng: np.random.Generator, lengths: Sequence[int], size: int) -> list[list[int]]:
    """All rows once: in random order, but texts of like length together, eight batches at a time."""
    order = rng.permutation(len(lengths)).tolist()
    batches = []
    for start in range(0, len(order), 8 * size):
        part = sorted(order[start : start + 8 * size], key=lengths.__getitem__)
        batches += [part[i : i + size] for i in range(0, len(part), size)]
    return [batches[i] for i in rng.permutation(len(batches))]
