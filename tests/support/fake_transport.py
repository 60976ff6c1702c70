"""A service made of a function: what it is asked is kept, what it answers is the test's."""

from __future__ import annotations

import asyncio
import json

import httpx

from inward_client import AsyncInward, Inward, Retries

HEAD = {"name": "legend", "kind": "legend", "version": 1}
AT_ONCE = Retries(patience=0.2, first=0.01, cap=0.05)


def envelope(version=1, **fields):
    head = {**HEAD, "version": version}
    usage = {"prompt_tokens": 2, "completion_tokens": 3, "cached_tokens": 1}
    return {"model": "tiny", "policy_version": "base", "head": head, "usage": usage, **fields}


def margins(pairs, version=1):
    """The margin of a pair is the number that stands in its prompt."""
    return httpx.Response(
        200, json=envelope(version, margins=[{"margin": float(p["prompt"]), "label_agrees": True} for p in pairs])
    )


def refused(status, message="no", headers=(), **fields):
    body = {"error": {"message": message, "type": "t", "param": None, "code": "c", **fields}}
    return httpx.Response(status, json=body, headers={"x-request-id": "abc", **dict(headers)})


class Service:
    """Counts, remembers, answers; for both clients."""

    def __init__(self, answer):
        self._answer = answer
        self.requests = []
        self.at_once = self.most_at_once = 0

    def bodies(self):
        return [json.loads(request.content) for request in self.requests]

    def client(self, **options):
        return Inward("http://service", http=self._http(), **{"retries": AT_ONCE, **options})

    def async_client(self, **options):
        return AsyncInward("http://service", http=self._http(), **{"retries": AT_ONCE, **options})

    def _http(self):
        return httpx.AsyncClient(transport=httpx.MockTransport(self._async))

    async def _async(self, request):
        self._enter(request)
        await asyncio.sleep(0)
        answer = self._take(request)
        self.at_once -= 1
        return answer

    def _enter(self, request):
        self.requests.append(request)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)

    def _take(self, request):
        answer = self._answer(request)
        if isinstance(answer, Exception):
            self.at_once -= 1
            raise answer
        return answer


def in_turn(*answers):
    """Gives these answers one after the other; the last one for ever."""
    left = list(answers)

    def answer(request):
        found = left.pop(0) if len(left) > 1 else left[0]
        return found(request) if callable(found) else found

    return answer
