"""Training of all weights, of judges, reward models and policies alike."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from inward_trainer.paper.language_model import reading_dtype


class Descent:
    """AdamW for so many steps: warm-up over a tenth of them, then a linear fall; gradients are clipped to norm 1."""

    def __init__(self, model: Any, *, lr: float, steps: int, weight_decay: float) -> None:
        self._model = model
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
        warmup = max(1, steps // 10)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))
        )

    def step(self) -> None:
        """With the gradients that have been added up since the last one."""
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Products in bfloat16 where the device multiplies it natively, weights in float32."""
    native = reading_dtype(device) is torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16) if native else nullcontext()
