"""TRL: reward functions for GRPOTrainer and RLOOTrainer, and columns for RewardTrainer (``margin``) and cDPO
(``confidence``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from inward_client import event_loop
from inward_client.adapters import rows
from inward_client.adapters.scoring import blame, in_place, readable, score_each
from inward_client.aio import AsyncInward
from inward_client.answers import Margin
from inward_client.client import Inward
from inward_client.errors import InvalidField, ServerError, TooLarge

LOG = logging.getLogger(__name__)
Value = Literal["score", "probability"]
CHUNK = 1024
"""Rows of a dataset that are in memory at once."""


class _Reward:
    """A reward for each completion, from the service.

    Prompts and completions may be texts or messages. A completion that can't be scored gets None, which TRL leaves out
    of the loss; the log says why, and ``<name>/unscored`` how many.

    Args:
        url: of the service; by default as ``Inward`` finds it.
        head: a LEGEND or hybrid head; by default the hybrid one.
        value: the raw score, or the calibrated probability.
        truncate: cut what is longer than the model takes.
        name: in TRL's logs (``rewards/<name>/mean``).
        options: of ``Inward``.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        head: str | None = None,
        value: Value = "score",
        truncate: bool = True,
        name: str = "inward",
        **options: Any,
    ) -> None:
        self.__name__ = name
        self._head, self._value, self._truncate = head, value, truncate
        self._url, self._options = url, options

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None}  # TRL may send the function to another process

    async def _rewards(
        self, client: AsyncInward, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]
    ) -> list[float | None]:
        items = readable(rows.item, zip(prompts, completions, strict=True), "completion")
        scores = await score_each(client, items, self._head, truncate=self._truncate)
        rewards = [None if score is None else getattr(score, self._value) for score in scores]
        if (log_metric := columns.get("log_metric")) is not None:
            log_metric(f"{self.__name__}/unscored", sum(reward is None for reward in rewards) / max(len(rewards), 1))
        return rewards


class InwardReward(_Reward):
    """A reward function: ``GRPOTrainer(reward_funcs=InwardReward(url), …)``, or RLOOTrainer's."""

    _client: Inward | None = None

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One reward for each completion, as TRL calls it."""
        self._client = self._client or Inward(self._url, **self._options)
        return event_loop.run(self._rewards(self._client._client, prompts, completions, columns))

    def close(self) -> None:
        """Closes the connections; the next call opens new ones."""
        if self._client is not None:
            self._client.close()
            self._client = None


class AsyncInwardReward(_Reward):
    """``InwardReward`` as a coroutine, which TRL runs beside other asynchronous reward functions."""

    _client: AsyncInward | None = None

    async def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One reward for each completion, as TRL calls it."""
        self._client = self._client or AsyncInward(self._url, **self._options)
        return await self._rewards(self._client, prompts, completions, columns)

    async def close(self) -> None:
        """Closes the connections; the next call opens new ones."""
        if self._client is not None:
            await self._client.close()
            self._client = None


def with_margins(
    dataset: Any,
    client: Inward,
    *,
    margin: Literal["bin", "margin_scaled", "margin"] = "bin",
    head: str | None = None,
    truncate: bool = True,
    drop_flipped: bool = False,
) -> Any:
    """A preference dataset with the ``margin`` that RewardTrainer subtracts in its loss.

    Args:
        dataset: a ``datasets.Dataset`` with ``chosen`` and ``rejected``, and ``prompt`` unless they are whole
            conversations. A column ``margin`` is replaced.
        client: of the service.
        margin: which of the margins; raw ones are in units of one model's layer and can be negative.
        head: by default the first LEGEND head.
        truncate: cut what is longer than the model takes.
        drop_flipped: leave out pairs whose label the head disagrees with.

    Returns:
        The dataset without the pairs that can't be scored; how many those are is logged.
    """

    def column(pairs: list[dict[str, Any]]) -> list[float | None]:
        found: list[Margin] = client.margin(pairs, head=head, truncate=truncate).margins
        return [None if drop_flipped and m.label_agrees is False else getattr(m, margin) for m in found]

    return _with_column(dataset, "margin", column)


def with_confidences(
    dataset: Any, client: Inward, *, head: str | None = None, truncate: bool = True, calibrated: bool = False
) -> Any:
    """A preference dataset with a ``confidence`` for each pair: the probability that its label is right, for cDPO.

    TRL's own DPO loss has no place for it; ``inward-train`` has.

    Args:
        dataset: as for ``with_margins``.
        client: of the service.
        head: by default the first hybrid head.
        truncate: cut what is longer than the model takes.
        calibrated: the probability calibrated on held-out pairs instead of gamma.

    Returns:
        The dataset without the pairs that can't be scored; how many those are is logged.
    """
    field = "confidence_calibrated" if calibrated else "confidence"

    def column(pairs: list[dict[str, Any]]) -> list[float | None]:
        return [getattr(pair, field) for pair in client.reward_pairs(pairs, head=head, truncate=truncate).rewards]

    return _with_column(dataset, "confidence", column)


def _with_column(dataset: Any, name: str, column: Callable[[list[dict[str, Any]]], list[float | None]]) -> Any:
    values: list[float | None] = []
    for start in range(0, len(dataset), CHUNK):
        chunk = dataset.select(range(start, min(start + CHUNK, len(dataset))))
        pairs = readable(rows.pair, ((row,) for row in chunk), "pair")
        values += in_place(pairs, _found(column, [pair for pair in pairs if pair is not None]))
    kept = [i for i, value in enumerate(values) if value is not None]
    if len(kept) < len(values):
        LOG.warning("%d of %d pairs have no %s and were left out", len(values) - len(kept), len(values), name)
    rest = dataset.remove_columns(name) if name in dataset.column_names else dataset
    return rest.select(kept).add_column(name, [values[i] for i in kept])


def _found(column: Callable[[list[dict[str, Any]]], list[float | None]], pairs: list[dict[str, Any]]) -> Any:
    try:
        return column(pairs) if pairs else []
    except (InvalidField, TooLarge, ServerError) as error:
        blame(error, "pairs")
        return [None] * len(pairs)
