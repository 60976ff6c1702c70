"""Stand-ins for what the API stands on: a tokenizer of characters, an intake that counts, control of two heads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import httpx

from inward.api.app import create_app
from inward.api.keys import KeyRing
from inward.api.services import Limits, Services
from inward.errors import Conflict, InwardError, NotFound
from inward.heads.registry import choose
from inward.prompts import Prompts
from inward.types import Gamma, Group, HeadRef, Kind, LayerScores, PairScores, Scored, Scores, Timing, Usage

LEGEND = HeadRef("harmless", "legend", 3)
HYBRID = HeadRef("helpful", "hybrid", 1)
SRR = HeadRef("lists", "srr", 2)
MAX_TOKENS = 200


class FakeTokenizer:
    """One token a character."""

    chat_template = None
    bos_token = bos_token_id = None
    eos_token = pad_token = unk_token = None
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Any:
        return {"input_ids": [[ord(c) for c in t] for t in text]}

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(map(chr, token_ids))


class FakeIntake:
    """The score of a response is its number of tokens; ``hold`` makes it wait, ``outcome`` changes what becomes of a
    group."""

    def __init__(self, refs: Mapping[str, HeadRef]) -> None:
        self.refs = refs
        self.calls: list[dict[str, Any]] = []
        self.hold: asyncio.Event | None = None
        self.cancelled = asyncio.Event()
        self.started = asyncio.Event()
        self.error: InwardError | None = None
        self.outcome: Callable[[int, Scored], Scored | InwardError] = lambda i, scored: scored

    async def score(
        self,
        groups: Sequence[Group],
        *,
        heads: tuple[str, ...],
        details: frozenset[str] = frozenset(),
        pair: bool = False,
        timeout: float = 60.0,
    ) -> list[Scored | InwardError]:
        self.calls.append({"groups": groups, "heads": heads, "details": details, "pair": pair, "timeout": timeout})
        self.started.set()
        if self.error:
            raise self.error
        try:
            if self.hold:
                await self.hold.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        refs = tuple(self.refs[name] for name in heads)
        return [self.outcome(i, _scored(g, refs, details, pair)) for i, g in enumerate(groups)]


def _scored(group: Group, refs: tuple[HeadRef, ...], details: frozenset[str], pair: bool) -> Scored:
    lengths = tuple(float(len(ids)) for ids in group.responses_ids)
    usage = Usage(len(group.prompt_ids) * len(lengths), int(sum(lengths)), len(group.prompt_ids) * (len(lengths) - 1))
    scores = tuple(_scores(ref, lengths, details, pair) for ref in refs)
    return Scored("job", refs, scores, "base", usage, timing=Timing(0.002, 0.005))


def _scores(ref: HeadRef, lengths: tuple[float, ...], details: frozenset[str], pair: bool) -> Scores:
    comparison: PairScores | None = None
    if pair:
        margin = lengths[0] - lengths[1]
        confidence = 0.75 if ref.kind == "hybrid" else None
        comparison = PairScores(margin, margin / 2, 0.5, margin > 0, label_probability=0.875, confidence=confidence)
    return Scores(
        lengths,
        probability_N=tuple(0.5 for _ in lengths) if ref.kind == "hybrid" else None,
        layers_N=tuple(LayerScores((4,), (n,)) for n in lengths) if "layers" in details else None,
        tokens_N=tuple(tuple(range(int(n))) for n in lengths) if "tokens" in details else None,
        pair=comparison,
        listwise=ref.kind == "srr",
        gamma=Gamma(7.5, True, 0.5) if ref.kind == "hybrid" else None,
    )


class FakeHeadControl:
    """Knows the heads it is given."""

    def __init__(self, refs: dict[str, HeadRef]) -> None:
        self.refs = refs
        self.updates: list[tuple[Any, ...]] = []
        self.calibrations: dict[str, dict[str, Any]] = {}
        self.refreshed: Callable[[], None] = lambda: None

    async def refresh(self) -> None:
        self.refreshed()

    def resolve(self, name: str | None, kinds: Sequence[Kind]) -> HeadRef:
        return choose(self.refs, name, kinds)

    def listing(self) -> list[dict[str, Any]]:
        return [{"name": ref.name, "kind": ref.kind, "version": ref.version} for ref in self.refs.values()]

    def show(self, name: str) -> dict[str, Any]:
        if name not in self.refs:
            raise NotFound(f"no head {name!r}", param="name")
        return {
            "name": name,
            "versions": [self.refs[name].version],
            "calibration": self.calibrations.get(name, {}),
        }

    async def activate(self, name: str, version: int) -> HeadRef:
        self.show(name)
        if version > 9:
            raise NotFound(f"head {name!r} has no version {version}", param="version")
        self.refs[name] = replace(self.refs[name], version=version)
        return self.refs[name]

    async def update(self, name: str, sequence: int, pairs: Sequence[Any], *, lr: float) -> HeadRef:
        self.show(name)
        if sequence != len(self.updates) + 1:
            raise Conflict(f"sequence {sequence} is not the next one", param="sequence")
        self.updates.append((name, sequence, pairs, lr))
        return replace(self.refs[name], version=self.refs[name].version + 1)


class FakePolicies:
    """Knows the versions ``v1`` and ``v2``."""

    def __init__(self) -> None:
        self.versions = ["base"]

    async def show(self) -> dict[str, Any]:
        history = [{"policy_version": version, "activated": "2025-01-01T00:00:00.000Z"} for version in self.versions]
        previous = self.versions[-2] if len(self.versions) > 1 else None
        return {
            "policy_version": self.versions[-1],
            "previous": previous,
            "available": ["base", "v1", "v2"],
            "history": history,
        }

    async def switch(self, version: str) -> dict[str, Any]:
        if version not in ("base", "v1", "v2"):
            raise NotFound(f"there is no adapter {version!r}", param="version")
        if version != self.versions[-1]:
            self.versions.append(version)
        return await self.show()


class FakeServices:
    """The app on fakes, and handles on all of them."""

    def __init__(
        self,
        *refs: HeadRef,
        keys: frozenset[str] = frozenset(),
        keys_file: Path | None = None,
        limits: Limits | None = None,
        metrics_open: bool = True,
        rerank_head: str | None = None,
        compat_head: str | None = None,
    ) -> None:
        self.refs = {ref.name: ref for ref in refs or (LEGEND, HYBRID)}
        self.intake = FakeIntake(self.refs)
        self.head_control = FakeHeadControl(self.refs)
        self.policies = FakePolicies()
        self.is_alive = True
        self.readiness = (True, "ready")
        self.services = Services(
            prompts=Prompts(FakeTokenizer(), max_tokens=MAX_TOKENS),
            intake=self.intake,
            heads=self.head_control,
            policies=self.policies,
            model="tiny",
            rerank_head=rerank_head,
            info=lambda: {"model": "tiny", "revision": "main", "limits": {"items": self.services.limits.items}},
            ready=lambda: self.readiness,
            alive=lambda: self.is_alive,
            limits=limits or Limits(body_bytes=1_000_000, items=50, candidates=10, timeout_s=30.0),
            keys=KeyRing(keys, keys_file),
            metrics_open=metrics_open,
            compat_head=compat_head,
        )
        self.app = create_app(self.services)

    def client(self, **options: Any) -> httpx.AsyncClient:
        """An HTTP client that calls the app without a network."""
        return httpx.AsyncClient(transport=httpx.ASGITransport(app=self.app), base_url="http://inward", **options)

    async def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        """One POST; ``body`` is sent as JSON, or as it is where it is bytes, or pieces of them."""
        headers = {"content-type": "application/json"} | options.pop("headers", {})
        async with self.client() as client:
            if isinstance(body, bytes | AsyncIterator):
                return await client.post(path, content=body, headers=headers, **options)
            return await client.post(path, json=body, headers=headers, **options)

    async def get(self, path: str, **options: Any) -> httpx.Response:
        """One GET."""
        async with self.client() as client:
            return await client.get(path, **options)


def error(response: httpx.Response) -> dict[str, Any]:
    """The error of an answer, which must have the one shape."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]
