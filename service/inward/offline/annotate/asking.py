"""Has the service annotate pairs. The service may be in this process or anywhere: what travels is the same, so the
numbers are too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from inward.errors import SetupError, Unavailable
from inward.offline.data.layouts import Pair

COLUMNS = ("margin", "margin_scaled", "margin_bin", "confidence", "chosen_score", "rejected_score", "label_agrees")
"""What is added to a row."""
TRIES = 10
"""How often one and the same request is sent when the service does not answer it."""
FIRST_TRIES = 3
"""The same for the first contact: a wrong address should be known at once."""
LONGEST_WAIT = 30.0
"""Seconds between two tries, at most."""

Columns = dict[str, float | bool | None]


@dataclass(frozen=True, slots=True)
class Annotator:
    """What annotates: the metadata of a file, and the same for all of its rows."""

    model: str
    revision: str
    fingerprint: str
    dtype: str
    policy_version: str
    template: str
    head: dict[str, Any]
    """Name, kind and version of the head that gives the margins."""
    confidence_head: dict[str, Any] | None
    """And of the one that gives the confidences."""
    inward: str
    """Version of the service."""


@dataclass(frozen=True, slots=True)
class Annotated:
    """One pair: its columns, or why there are none."""

    columns: Columns | None
    error: str | None = None
    truncated: bool = False


class MarginClient:
    """Sends pairs to ``/margin``.

    Args:
        client: with the service's address, its key, and no time limit of its own.
        head: name of the head; None takes the service's only one.
        truncate: cut text that is longer than the model takes, instead of refusing the row.
    """

    def __init__(self, client: httpx.AsyncClient, *, head: str | None, truncate: bool) -> None:
        self._client, self._head, self._truncate = client, head, truncate

    async def annotator(self) -> Annotator:
        """Who annotates.

        Raises:
            SetupError: no service, no key for it, or not such a head.
        """
        info = await self._get("/info", FIRST_TRIES)
        answer = await self._post([Pair("question", "answer", "answer")])
        if answer.status_code != 200:
            raise SetupError(f"the service can't annotate pairs: {_message(answer)}")
        head = answer.json()["head"]
        hybrid = None
        if answer.json()["margins"][0]["confidence"] is not None:
            heads = (await self._get("/heads"))["heads"]
            hybrid = head if head["kind"] == "hybrid" else next((h for h in heads if h["kind"] == "hybrid"), None)
        return Annotator(
            info["model"], info["revision"], info["fingerprint"], info["dtype"], answer.json()["policy_version"], info["template"],
            head, {name: hybrid[name] for name in ("name", "kind", "version")} if hybrid else None, info["version"],
        )  # fmt: skip

    async def annotate(self, pairs: Sequence[Pair]) -> tuple[list[Annotated], dict[str, Any] | None]:
        """One result for each pair, in order, and which version of head and policy gave them (None: no pair was
        annotated).

        What the service refuses as a whole is asked in halves, so that a bad row harms itself only.

        Raises:
            SetupError: the service refuses us: no key, or no such head.
            Unavailable: it did not answer for minutes.
        """
        if not pairs:
            return [], None
        answer = await self._post(pairs)
        if answer.status_code == 200:
            content = answer.json()
            by = {"head": content["head"], "policy_version": content["policy_version"]}
            return [_annotated(margin) for margin in content["margins"]], by
        if answer.status_code in (401, 403, 404):
            raise SetupError(f"the service refuses the request: {_message(answer)}")
        if len(pairs) == 1:
            return [Annotated(None, _message(answer))], None
        middle = len(pairs) // 2
        first, by_first = await self.annotate(pairs[:middle])
        second, by_second = await self.annotate(pairs[middle:])
        return [*first, *second], by_second or by_first

    async def _get(self, path: str, tries: int = TRIES) -> Any:
        answer = await self._sent("GET", path, None, tries)
        if answer.status_code != 200:
            raise SetupError(f"{self._client.base_url}: GET {path} answers {answer.status_code}: {_message(answer)}")
        return answer.json()

    async def _post(self, pairs: Sequence[Pair]) -> httpx.Response:
        body: dict[str, Any] = {"pairs": [pair.body() for pair in pairs], "truncate": self._truncate}
        return await self._sent("POST", "/margin", body | ({"head": self._head} if self._head else {}))

    async def _sent(self, method: str, path: str, body: dict[str, Any] | None, tries: int = TRIES) -> httpx.Response:
        """Asks again while the service is overloaded, restarting or away."""
        wait, said = 0.5, ""
        for _ in range(tries):
            try:
                answer = await self._client.request(method, path, json=body)
            except httpx.TransportError as error:
                said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            else:
                if answer.status_code not in (429, 500, 502, 503) and not (answer.status_code == 504 and _alone(body)):
                    return answer
                said = _message(answer)
                wait = max(wait, _retry_after(answer))
            await asyncio.sleep(min(wait, LONGEST_WAIT))
            wait *= 2
        raise Unavailable(
            f"{self._client.base_url} did not answer {tries} times in a row ({said}); what is done is kept, so run the same again later"
        )


def _annotated(margin: dict[str, Any]) -> Annotated:
    if margin["error"] is not None:
        return Annotated(None, margin["error"]["message"])
    return Annotated(
        {name: margin["bin" if name == "margin_bin" else name] for name in COLUMNS}, truncated=margin["truncated"]
    )


def _alone(body: dict[str, Any] | None) -> bool:
    return body is None or len(body["pairs"]) == 1


def _retry_after(answer: httpx.Response) -> float:
    try:
        return float(answer.headers.get("retry-after", 0))
    except ValueError:
        return 0.0


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {answer.status_code}"
