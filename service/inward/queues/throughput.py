"""How fast a queue empties."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Throughput:
    """Tokens settled per second of work, from a moving average over recent batches; what ``Retry-After`` is worked
    out from.
    """

    tokens_per_second: float = 0.0
    _since: float = 0.0

    def start(self, now: float) -> None:
        """Work begins after idling."""
        self._since = now

    def settled(self, tokens: int, now: float) -> None:
        elapsed = max(now - self._since, 1e-6)
        rate = tokens / elapsed
        self.tokens_per_second = rate if not self.tokens_per_second else 0.7 * self.tokens_per_second + 0.3 * rate
        self._since = now

    def seconds(self, tokens: int) -> float:
        """How long ``tokens`` take at this pace; 1 before anything was measured."""
        return tokens / self.tokens_per_second if self.tokens_per_second else 1.0
