"""The Inward service as the trainer asks it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from inward_trainer.errors import ServiceError, ServiceGone
from inward_trainer.pairs import Prompt, ScoredPair

T = TypeVar("T")
R = TypeVar("R")

RETRIED = frozenset({429, 502, 503, 504})
"""Statuses that may be another one a moment later."""
SLICE = 64
"""Pairs or items in one request."""
BASE = "base"
"""The policy without an adapter."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """The samples of one prompt, best first: text, score, and whether it ended by itself."""

    texts: tuple[str, ...]
    scores: tuple[float, ...]
    finished: tuple[bool, ...]
    policy_version: str
    confidence: float | None
    """Of the first against the last; None where all scores are the same."""


class Service:
    """Safe to use from several threads. What may pass (a restart, overload) is waited for; everything asked is safe to
    ask again.

    Args:
        url: such as ``http://127.0.0.1:8080``.
        api_key: sent as Bearer.
        patience: seconds for which a service that does not answer is waited for.
        at_once: requests in flight, where there are many to send.
        transport: httpx's, for tests.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        patience: float = 600.0,
        at_once: int = 8,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(
            base_url=url, headers=headers, timeout=httpx.Timeout(150.0, connect=10.0), transport=transport
        )
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="service")
        self._patience = patience

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._client.close()

    def many(self, ask: Callable[[T], R], of: Sequence[T]) -> list[R]:
        """``ask`` of each, several at once, in order."""
        return list(self._threads.map(ask, of))

    def draw(self, prompt: Prompt, n: int, sampling: Mapping[str, Any], head: str | None = None) -> Drawn | None:
        """N samples of the policy as it is in the service now; None if fewer than one could be scored.

        Raises:
            ServiceError: it refuses the prompt.
        """
        body: dict[str, Any] = {"prompt": prompt, "n": n, "sampling": dict(sampling)}
        answer = self._post("/rerank", body | ({"head": head} if head else {}))
        usable = [
            result for result in answer["results"] if result.get("score") is not None and result.get("text") is not None
        ]
        if not usable:
            return None
        return Drawn(
            texts=tuple(result["text"] for result in usable),
            scores=tuple(float(result["score"]) for result in usable),
            finished=tuple(result.get("finish_reason") != "length" for result in usable),
            policy_version=str(answer["policy_version"]),
            confidence=(answer.get("pair") or {}).get("confidence"),
        )

    def rewards(self, pairs: Sequence[ScoredPair], head: str | None = None) -> list[dict[str, Any]]:
        """The hybrid head's ``chosen_score``, ``rejected_score``, ``confidence`` of each, or an ``error``; and the
        ``policy_version``.
        """

        def ask(some: Sequence[ScoredPair]) -> list[dict[str, Any]]:
            body: dict[str, Any] = {"pairs": [pair.texts() for pair in some]}
            answer = self._post("/reward", body | ({"head": head} if head else {}))
            return [{**reward, "policy_version": answer["policy_version"]} for reward in answer["rewards"]]

        return [reward for rewards in self.many(ask, list(_slices(pairs))) for reward in rewards]

    def scores(self, items: Sequence[tuple[Prompt, str]], head: str) -> list[float | None]:
        """Any pointwise head's score of each prompt and response."""

        def ask(some: Sequence[tuple[Prompt, str]]) -> list[float | None]:
            body = {"items": [{"prompt": prompt, "response": response} for prompt, response in some], "head": head}
            return [score["score"] for score in self._post("/score", body)["scores"]]

        return [score for scores in self.many(ask, list(_slices(items))) for score in scores]

    def margins(self, pairs: Sequence[ScoredPair], head: str | None = None) -> list[dict[str, Any]]:
        """The LEGEND head's ``margin``, ``margin_scaled``, ``bin``, ``label_agrees`` of each; an ``error`` where
        there is none.
        """

        def ask(some: Sequence[ScoredPair]) -> list[dict[str, Any]]:
            body: dict[str, Any] = {"pairs": [pair.texts() for pair in some]}
            margins: list[dict[str, Any]] = self._post("/margin", body | ({"head": head} if head else {}))["margins"]
            return margins

        return [margin for margins in self.many(ask, list(_slices(pairs))) for margin in margins]

    def head(self, name: str) -> dict[str, Any]:
        """What ``GET /heads/{name}`` says."""
        return self._get(f"/heads/{name}")

    def update_head(self, name: str, sequence: int, pairs: Sequence[ScoredPair], lr: float) -> bool:
        """One online step of a head, applied once however often it is sent.

        Returns:
            Whether it was applied now or by the same call before; False if a later one was, so that this one must have
            been, too.
        """
        if sequence < int(self.head(name)["sequence"]):
            return False
        self._post(f"/heads/{name}/update", {"sequence": sequence, "pairs": [pair.texts() for pair in pairs], "lr": lr})
        return True

    def policy(self) -> dict[str, Any]:
        """What ``GET /policy`` says."""
        return self._get("/policy")

    def load_policy(self, version: str) -> None:
        """Makes the service sample and score with an adapter of its folder; nothing happens if it does already."""
        if self.policy()["policy_version"] != version:
            self._post("/policy", {"version": version})

    def create_job(self, rows: bytes, head: str | None = None) -> str:
        """Uploads JSONL of pairs as a bulk job of kind ``reward``; gives its id."""
        query = {"kind": "reward"} | ({"head": head} if head else {})
        return str(
            self._ask(
                "POST", "/jobs", params=query, content=rows, headers={"content-type": "application/x-ndjson"}
            ).json()["id"]
        )

    def job(self, id: str) -> dict[str, Any]:
        """How far a bulk job is."""
        return self._get(f"/jobs/{id}")

    def job_results(self, id: str) -> str:
        """Its results, JSONL in the order of the rows."""
        return self._ask("GET", f"/jobs/{id}/results").text

    def _get(self, path: str) -> dict[str, Any]:
        answer: dict[str, Any] = self._ask("GET", path).json()
        return answer

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = self._ask("POST", path, json=body).json()
        return answer

    def _ask(self, method: str, path: str, **request: Any) -> httpx.Response:
        end, pause = time.monotonic() + self._patience, 0.2
        while True:
            try:
                answer = self._client.request(method, path, **request)
            except httpx.TransportError as error:
                problem, wait = f"{type(error).__name__}: {error}", pause
            else:
                if answer.status_code < 400:
                    return answer
                problem = _message(answer)
                if answer.status_code not in RETRIED:
                    raise ServiceError(f"{method} {path}: {answer.status_code} {problem}", answer.status_code)
                wait = max(pause, _seconds(answer.headers.get("retry-after")))
            if time.monotonic() + wait > end:
                raise ServiceGone(
                    f"{method} {self._client.base_url}{path.lstrip('/')}: no answer for {self._patience:.0f} s ({problem})"
                )
            time.sleep(wait)
            pause = min(2 * pause, 10.0)


def _slices(values: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), SLICE):
        yield values[start : start + SLICE]


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:200]


def _seconds(retry_after: str | None) -> float:
    return float(retry_after) if retry_after and retry_after.isdigit() else 0.0
