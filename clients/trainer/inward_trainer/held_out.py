"""Does the policy get better? A fresh sample of each held-out prompt, scored by the head that it is trained against
and by the monitor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from inward_trainer.pairs import Prompt, ScoredPair
from inward_trainer.service import Draw, Sample, Service
from inward_trainer.statistics import estimates


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
        head: str,
        monitor: str | None,
        seed: int = 0,
    ) -> None:
        self._service, self._sampling = service, dict(sampling)
        self._draws = [Draw(place, prompt, (seed + place) % 2**32) for place, prompt in enumerate(prompts)]
        self._head, self._monitor = head, monitor

    def divergence(self, measure: Callable[[Sequence[ScoredPair]], Sequence[float]]) -> dict[str, float]:
        """``held_out/kl``: the policy's KL to its reference, in nats an answer, with its standard error. Answers are
        drawn for it as the policy has them, at temperature 1 with nothing cut off.

        Args:
            measure: gives the estimate of each answer, which stands on both sides of a pair.
        """
        plain = {name: value for name, value in self._sampling.items() if name in ("max_tokens", "stop")}
        drawn = self._service.draw(self._draws, 1, {**plain, "temperature": 1.0}, self._head)
        pairs = [_both_sides(draw, one.samples[0]) for draw, one in zip(self._draws, drawn, strict=True) if one]
        return estimates("held_out", {"kl": measure(pairs)})

    def __call__(self) -> dict[str, float]:
        """Means over the prompts that the service takes, each with its standard error: ``held_out/reward``,
        ``held_out/length`` in characters, ``held_out/monitor`` where there is one; and how many, ``held_out/answers``.
        """
        drawn = self._service.draw(self._draws, 1, self._sampling, self._head)
        found = [(d.prompt, one.samples[0]) for d, one in zip(self._draws, drawn, strict=True) if one is not None]
        values = {"reward": [one.score for _, one in found], "length": [float(len(one.text)) for _, one in found]}
        if self._monitor is not None and found:
            scores = self._service.scores([(prompt, one.text) for prompt, one in found], self._monitor)
            values["monitor"] = [score for score in scores if score is not None]
        return {"held_out/answers": len(found)} | estimates("held_out", values)


def _both_sides(draw: Draw, sample: Sample) -> ScoredPair:
    ids, finished = sample.ids, (sample.finished, sample.finished)
    return ScoredPair(
        str(draw.place), draw.prompt, sample.text, sample.text, finished=finished, chosen_ids=ids, rejected_ids=ids
    )
