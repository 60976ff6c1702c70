"""verl: a reward function to be named in its configuration.

    reward:
      custom_reward_function:
        path: pkg://inward_client.adapters.verl
        name: compute_score
        reward_kwargs: {url: "http://127.0.0.1:8080"}

verl hands over the response but not the prompt, so the rows of the data set carry it in ``extra_info``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

from inward_client.adapters import rows
from inward_client.aio import AsyncInward
from inward_client.answers import Score
from inward_client.client import Inward

PROMPTS = ("prompt", "raw_prompt", "question")
"""Keys of ``extra_info`` under which the prompt is looked for."""
_asynchronous: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str | None, AsyncInward]] = WeakKeyDictionary()


def compute_score(
    data_source: Any,
    solution_str: str,
    ground_truth: Any = None,
    extra_info: Mapping[str, Any] | None = None,
    *,
    url: str | None = None,
    head: str | None = None,
    prompt_key: str | None = None,
    **others: Any,
) -> dict[str, float]:
    """The score of one response, as verl calls it.

    Args:
        data_source, ground_truth, others: verl's; not used.
        solution_str: the response.
        extra_info: of the row; holds the prompt, a text or messages.
        url: of the service; by default as ``Inward`` finds it.
        head: a LEGEND or hybrid head; by default the hybrid one.
        prompt_key: where the prompt is in ``extra_info``; by default the first of ``PROMPTS``.

    Returns:
        ``score``, and ``probability`` where the head is calibrated.

    Raises:
        ValueError: the row has no prompt.
        InwardError: the response could not be scored.
    """
    item = rows.item(_prompt(extra_info, prompt_key), solution_str)
    client = _client(url)
    if head is None:
        return _told(client.reward([item], truncate=True).rewards[0])
    return _told(client.score([item], head=head, truncate=True).scores[0])


async def compute_score_async(
    data_source: Any,
    solution_str: str,
    ground_truth: Any = None,
    extra_info: Mapping[str, Any] | None = None,
    *,
    url: str | None = None,
    head: str | None = None,
    prompt_key: str | None = None,
    **others: Any,
) -> dict[str, float]:
    """``compute_score`` as a coroutine, of which verl runs many at once."""
    item = rows.item(_prompt(extra_info, prompt_key), solution_str)
    client = _client_of_loop(url)
    if head is None:
        return _told((await client.reward([item], truncate=True)).rewards[0])
    return _told((await client.score([item], head=head, truncate=True)).scores[0])


@cache
def _client(url: str | None) -> Inward:
    return Inward(url)


def _client_of_loop(url: str | None) -> AsyncInward:
    clients = _asynchronous.setdefault(asyncio.get_running_loop(), {})
    if url not in clients:
        clients[url] = AsyncInward(url)
    return clients[url]


def _prompt(extra_info: Mapping[str, Any] | None, key: str | None) -> Any:
    given = extra_info or {}
    for name in (key,) if key else PROMPTS:
        if (prompt := given.get(name)) is not None:
            return prompt if isinstance(prompt, str) else list(prompt)
    raise ValueError(
        f"extra_info has no prompt under {key or ', '.join(PROMPTS)}; put it there when the data set is prepared"
    )


def _told(score: Score) -> dict[str, float]:
    told = {"score": score.score, "probability": score.probability}
    return {name: value for name, value in told.items() if value is not None}
