"""Alignment in small: SFT, DPO and cDPO of all weights, one step at a time, so that the policy can be drawn from and
read in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from inward.backbones.transformers.packing import rectangles
from inward_trainer.losses import cdpo_loss
from inward_trainer.paper.batches import most_trained
from inward_trainer.paper.descent import Descent, autocast
from inward_trainer.paper.language_model import LanguageModel, answer_log_probs, load_causal, reading_dtype
from inward_trainer.paper.texts import Text

BETA = 0.15
"""The authors' code's."""


@dataclass(frozen=True, slots=True)
class Preference:
    """A pair that a policy is aligned on, with the probability that its label is right."""

    chosen: Text
    rejected: Text
    confidence: float = 1.0


class Alignment:
    """A policy in float32, its reference, and an optimiser for so many steps."""

    def __init__(self, base: LanguageModel, folder: Path, *, lr: float, steps: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.device, self._base = base.device, base
        self.policy = load_causal(folder, torch.float32, base.device).train()
        self._reference = load_causal(folder, torch.float32, base.device).eval()
        self._reader = LanguageModel(load_causal(folder, reading_dtype(base.device), base.device), base.tokeniser)
        self._descent = Descent(self.policy, lr=lr, steps=steps, weight_decay=0.0)

    def prefer(self, rows: Sequence[Preference]) -> dict[str, float]:
        """One step of cDPO: ``loss``, and ``accuracy``, how often DPO's own reward is higher for the chosen answer."""
        loss, right = 0.0, 0.0
        for places in self._parts([max(len(r.chosen.ids), len(r.rejected.ids)) for r in rows], 2):
            part = [rows[i] for i in places]
            texts = [row.chosen for row in part] + [row.rejected for row in part]
            with torch.no_grad(), autocast(self.device):
                reference = answer_log_probs(self._reference, texts, self._base.pad)
            with autocast(self.device):
                policy = answer_log_probs(self.policy, texts, self._base.pad)
            chosen, rejected = (policy - reference).chunk(2)
            gamma = torch.tensor([row.confidence for row in part], device=self.device)
            z = BETA * (chosen - rejected)
            lost = cdpo_loss(z, gamma).sum() / len(rows)
            lost.backward()  # type: ignore[no-untyped-call]
            loss, right = loss + float(lost.detach()), right + float((z > 0).sum() + 0.5 * (z == 0).sum())
        self._descent.step()
        return {"loss": loss, "accuracy": right / len(rows)}

    def imitate(self, rows: Sequence[Text]) -> dict[str, float]:
        """One step of SFT: ``loss``, nats a token."""
        tokens = sum(len(text.answer_ids) for text in rows)
        loss = 0.0
        for places in self._parts([len(text.ids) for text in rows], 1):
            with autocast(self.device):
                lost: Tensor = -answer_log_probs(self.policy, [rows[i] for i in places], self._base.pad).sum() / tokens
            lost.backward()  # type: ignore[no-untyped-call]
            loss += float(lost.detach())
        self._descent.step()
        return {"loss": loss}

    def reader(self) -> LanguageModel:
        """The policy as it is now, to be drawn from and read; it changes with the next call only."""
        with torch.no_grad():
            for to, weight in zip(self._reader.model.parameters(), self.policy.parameters(), strict=True):
                to.copy_(weight)
        return self._reader

    def _parts(self, lengths: Sequence[int], texts: int) -> Iterator[list[int]]:
        """Rows of one step that fit a pass; each has ``texts`` texts."""
        return rectangles(lengths, most_trained(self.device) // texts)


def minibatches(count: int, size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Places of rows for so many steps, every epoch in another order."""
    rng = np.random.default_rng(seed)
    queue: list[int] = []
    for _ in range(steps):
        while len(queue) < min(size, count):
            queue += rng.permutation(count).tolist()
        yield queue[:size]
        queue = queue[size:]
