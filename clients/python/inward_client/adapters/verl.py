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
import math
from collections.abc import Mapping
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

from inward_client import event_loop
from inward_client.adapters import rows
from inward_client.adapters.scoring import readable, score_each
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
    unscored: float = 0.0,
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
        unscored: the score of a response that can't be scored; verl takes numbers only.

    Returns:
        ``score``, ``probability`` (NaN where the head is not calibrated) and ``unscored``, which is 1 where the score
        is the argument's, and else 0. verl wants the same keys for every row.

    Raises:
        ValueError: the row has no prompt.
        InwardError: the service could not do its part.
    """
    items = readable(rows.item, [(_prompt(extra_info, prompt_key), solution_str)], "response")
    return _told(event_loop.run(score_each(_client(url)._client, items, head))[0], unscored)


async def compute_score_async(
    data_source: Any,
    solution_str: str,
    ground_truth: Any = None,
    extra_info: Mapping[str, Any] | None = None,
    *,
    url: str | None = None,
    head: str | None = None,
    prompt_key: str | None = None,
    unscored: float = 0.0,
    **others: Any,
) -> dict[str, float]:
    """``compute_score`` as a coroutine, of which verl runs many at once."""
    items = readable(rows.item, [(_prompt(extra_info, prompt_key), solution_str)], "response")
    return _told((await score_each(_client_of_loop(url), items, head))[0], unscored)


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


def _told(score: Score | None, unscored: float) -> dict[str, float]:
    known = score is not None and score.score is not None
    return {
        "score": score.score if score is not None and score.score is not None else unscored,
        "probability": math.nan if score is None or score.probability is None else score.probability,
        "unscored": float(not known),
    }
