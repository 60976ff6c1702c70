"""NeMo-RL: an environment whose reward is the service's.

    import ray
    from inward_client.adapters.nemo import InwardEnvironment

    environment = ray.remote(InwardEnvironment).remote({"url": "http://127.0.0.1:8080"})

It is an ``EnvironmentInterface`` by its methods. Episodes have one turn. For NeMo Gym no adapter is needed: the service
answers ``/verify`` and ``/seed_session`` itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from inward_client import event_loop
from inward_client.adapters import rows
from inward_client.adapters.scoring import readable, score_each
from inward_client.client import Inward


class EnvironmentReturn(NamedTuple):
    """Field for field NeMo-RL's class of this name; all of it is batched."""

    observations: list[dict[str, str]]
    metadata: list[Any]
    next_stop_strings: list[Any]
    rewards: Any
    """Tensor ``[B]``, float32."""
    terminateds: Any
    """Tensor ``[B]``, bool."""
    answers: list[str | None] | None = None


class InwardEnvironment:
    """Rewards the last message of each conversation.

    Args:
        config: ``url``, ``head`` (a LEGEND or hybrid head; by default the hybrid one), ``value`` (``score`` or
            ``probability``), ``unscored`` (reward of a conversation that can't be scored, by default 0; the log and the
            metric ``inward/unscored`` tell); whatever else it holds is handed to ``Inward``.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        options = dict(config or {})
        self._head: str | None = options.pop("head", None)
        self._value: str = options.pop("value", "score")
        self._unscored: float = options.pop("unscored", 0.0)
        self._share_unscored = 0.0
        self._inward = Inward(options.pop("url", None), **options)

    def step(
        self, message_log_batch: Sequence[Sequence[Mapping[str, Any]]], metadata: Sequence[Any]
    ) -> EnvironmentReturn:
        """Scores a batch; every episode ends.

        Raises:
            InwardError: the service could not do its part.
        """
        import torch  # NeMo-RL brings it

        items = readable(rows.item, ((log[:-1], log[-1:]) for log in message_log_batch), "conversation")
        scores = event_loop.run(score_each(self._inward._client, items, self._head))
        known = [None if score is None else getattr(score, self._value) for score in scores]
        rewards = [self._unscored if reward is None else reward for reward in known]
        self._share_unscored = known.count(None) / max(len(known), 1)
        observations = [{"role": "environment", "content": f"reward: {reward:.4f}"} for reward in rewards]
        ended = torch.ones(len(rewards), dtype=torch.bool)
        values = torch.tensor(rewards, dtype=torch.float32)
        return EnvironmentReturn(
            observations, list(metadata), [None] * len(rewards), values, ended, [None] * len(rewards)
        )

    def global_post_process_and_metrics(self, batch: Any) -> tuple[Any, dict[str, float]]:
        """The batch as it is, the mean reward, and the share of the last step that could not be scored."""
        mean = {"inward/mean_reward": float(batch["total_reward"].mean())} if "total_reward" in batch else {}
        return batch, {**mean, "inward/unscored": self._share_unscored}

    def shutdown(self) -> None:
        """Closes the connections."""
        self._inward.close()
