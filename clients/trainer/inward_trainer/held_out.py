"""Does the policy get better? A fresh sample of each held-out prompt, scored by the head that it is trained against
and by the monitor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from inward_trainer.pairs import Prompt
from inward_trainer.service import Drawn, Service


class HeldOut:
    """The same prompts and seeds for every version, so that versions differ by the policy only.

    Args:
        head: hybrid head.
        monitor: a head that nobody updates, or None.
    """

    def __init__(
        self,
        service: Service,
        prompts: Sequence[Prompt],
        sampling: Mapping[str, Any],
        *,
        head: str | None,
        monitor: str | None,
        seed: int = 0,
    ) -> None:
        self._service, self._prompts, self._sampling, self._seed = service, prompts, dict(sampling), seed
        self._head, self._monitor = head, monitor

    def __call__(self) -> dict[str, float]:
        """Means over the prompts: ``held_out/reward``, ``held_out/length`` in characters, and ``held_out/monitor``
        where there is one.
        """
        drawn = self._service.many(self._draw, list(enumerate(self._prompts)))
        found = [(prompt, one) for prompt, one in zip(self._prompts, drawn, strict=True) if one is not None]
        means = {
            "held_out/reward": fmean(one.scores[0] for _, one in found),
            "held_out/length": fmean(len(one.texts[0]) for _, one in found),
        }
        if self._monitor is not None:
            scores = self._service.scores([(prompt, one.texts[0]) for prompt, one in found], self._monitor)
            means["held_out/monitor"] = fmean(score for score in scores if score is not None)
        return means

    def _draw(self, numbered: tuple[int, Prompt]) -> Drawn | None:
        place, prompt = numbered
        return self._service.draw(prompt, 1, self._sampling | {"seed": (self._seed + place) % 2**32}, self._head)
