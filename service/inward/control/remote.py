"""Heads and policy as an API replica controls them: it knows them from what the workers say of themselves and has a
worker switch and update them.

A worker's ``ControlAgent`` does what is asked with the worker's own desk and then tells all workers to read the heads
folder again, which they share. So versions live on disk only, and every worker serves the same ones. Which policy
version is carried is remembered in Redis: a new worker takes no job before it carries that one too.

Replicas and workers need not be of one version: fields that one does not know are skipped, and a request that a worker
does not know is answered with an error that says so.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from inward import codec, logs
from inward.control import tokenizer_files
from inward.control.channel import ControlChannel
from inward.control.heads import LocalHeadControl
from inward.control.lora_adapters import Activation, History, LocalPolicyControl
from inward.errors import EngineDead, InternalError, InwardError, Unavailable, from_code
from inward.heads.registry import KINDS, Registry, choose
from inward.prompts import Texts
from inward.types import BackboneInfo, HeadRef, Kind, Scored

LOG = logs.logger("control")
PATIENCE_S = 60.0
"""That a worker may take for an online step or a switch."""
FOLLOWED_S = 15.0
"""That the other workers may take to follow it; one that died counts as there for some of them (the setting
``presence``)."""
AGAIN_S = 1.0
"""Between two tries while Redis is away, or while the policy of the others can't be carried."""
RELOAD = b"versions"
"""The one piece of news: a version of a head was made or switched to, or another policy."""


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """Who a worker is."""

    version: str
    backbone: BackboneInfo
    policy_version: str
    template: str
    tokenizer: str
    """Hash of its tokenizer: a replica with another one would send it other tokens."""
    max_tokens: int
    heads: tuple[dict[str, Any], ...]

    def encode(self) -> bytes:
        return codec.encode_map("worker_info", asdict(self))

    @classmethod
    def decode(cls, data: bytes) -> WorkerInfo:
        """Raises ``Unreadable``."""
        info = codec.convert(codec.decode_map(data, "worker_info"), cls)
        _ = info.refs  # can be read as well
        return info

    @property
    def refs(self) -> dict[str, HeadRef]:
        """The heads that it serves, by name."""
        return {ref.name: ref for ref in (codec.convert(row, HeadRef) for row in self.heads)}


@dataclass(frozen=True, slots=True)
class Activate:
    """A request to a worker: switch to a version of a head."""

    name: str
    version: int


@dataclass(frozen=True, slots=True)
class Update:
    """A request to a worker: one online step of a head."""

    name: str
    sequence: int
    pairs: tuple[Texts, ...]
    lr: float


@dataclass(frozen=True, slots=True)
class SwitchPolicy:
    """A request to a worker: carry a policy version."""

    version: str


VERBS = ("activate", "update", "switch_policy", "policy", tokenizer_files.VERB)
"""What a worker can be asked; the last two change nothing."""


class RemoteHeadControl:
    """See the module; one for each API replica.

    Args:
        template: how this replica renders prompts.
        tokenizer: hash of this replica's tokenizer; workers that differ in either are not counted.
    """

    def __init__(self, control: ControlChannel, *, template: str, tokenizer: str) -> None:
        self._control, self._template, self._tokenizer = control, template, tokenizer
        self.workers: dict[str, WorkerInfo] = {}
        self.problem = "no worker has been heard of yet"
        """Why there are no workers, if there are none."""

    async def refresh(self) -> None:
        """Reads the workers.

        Raises:
            Unavailable: Redis is away; they stay as they were.
        """
        workers, problem = {}, "no worker takes jobs from the queue"
        for worker, data in (await self._control.workers()).items():
            try:
                worker_info = WorkerInfo.decode(data)
            except codec.Unreadable as error:
                problem = f"worker {worker}: {error}"
                continue
            if worker_info.tokenizer != self._tokenizer:
                problem = (
                    f"worker {worker} serves {worker_info.backbone.name} with another tokenizer: "
                    "give both the same --model"
                )
            elif worker_info.template != self._template:
                problem = f"worker {worker} renders prompts with another template: give both the same --template"
            else:
                workers[worker] = worker_info
        backbones = sorted({worker_info.backbone.identity for worker_info in workers.values()})
        if len(backbones) > 1:
            problem = (
                f"the workers have different weights or dtypes ({', '.join(backbones)}): give all workers of a queue "
                "the same --model, --revision and --dtype"
            )
            workers = {}
        self.workers, self.problem = workers, problem

    @property
    def worker_info(self) -> WorkerInfo:
        """Any worker's.

        Raises:
            EngineDead: there is none.
        """
        if not self.workers:
            raise EngineDead(self.problem, retry_after=5.0)
        return next(iter(self.workers.values()))

    def current(self, scored: Scored) -> bool:
        """Whether all workers would score with the same versions of heads and policy, and the same backbone, now."""

        def would(worker_info: WorkerInfo) -> bool:
            backbone, refs = worker_info.backbone, worker_info.refs
            computed = (worker_info.policy_version, backbone.fingerprint, backbone.dtype)
            return computed == scored.version[1:] and all(refs.get(ref.name) == ref for ref in scored.heads)

        return all(map(would, self.workers.values()))

    def resolve(self, name: str | None, kinds: Sequence[Kind]) -> HeadRef:
        return choose(self.worker_info.refs, name, kinds)

    def listing(self) -> list[dict[str, Any]]:
        return list(self.worker_info.heads)

    def show(self, name: str) -> dict[str, Any]:
        self.resolve(name, KINDS)
        return next(row for row in self.worker_info.heads if row["name"] == name)

    async def activate(self, name: str, version: int) -> HeadRef:
        return await self._switched(await self.ask("activate", asdict(Activate(name, version))))

    async def update(self, name: str, sequence: int, pairs: Sequence[Texts], *, lr: float) -> HeadRef:
        return await self._switched(await self.ask("update", asdict(Update(name, sequence, tuple(pairs), lr))))

    async def ask(self, verb: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Has a worker do it, and gives its answer.

        Raises:
            InwardError: the worker's, or there is none that answers.
        """
        _ = self.worker_info  # there is somebody to ask
        answer = codec.decode_map(await self._control.ask(codec.encode_map(verb, arguments), PATIENCE_S), "answer")
        if (error := answer.get("error")) is not None:
            raise from_code(error["code"], error["message"], param=error.get("param"))
        return answer

    async def until_all(self, serve: Callable[[WorkerInfo], bool], **what: Any) -> None:
        """So that who asked finds the new version whichever worker takes the next job. A worker that hangs holds
        nobody up for long.
        """
        end = time.monotonic() + FOLLOWED_S
        while time.monotonic() < end:
            await self.refresh()
            if all(map(serve, self.workers.values())):
                return
            await asyncio.sleep(0.05)
        logs.event(LOG, "not_everywhere", **what)

    async def _switched(self, answer: dict[str, Any]) -> HeadRef:
        ref = codec.convert(answer["head"], HeadRef)

        def serves(worker_info: WorkerInfo) -> bool:
            return worker_info.refs.get(ref.name, ref) == ref

        await self.until_all(serves, head=ref.name, version=ref.version)
        return ref


class ControlAgent:
    """Does in a worker what a replica asks for, and keeps its heads and its policy in step with those of the others.

    Args:
        publish: makes what the worker says of itself known at once.
        welcome: set while the worker may take jobs; one that may not, since its backbone is another, does no requests.
        files: the model's tokenizer and settings, for replicas that can't read them from its own file.
    """

    def __init__(
        self,
        control: ControlChannel,
        worker: str,
        head_control: LocalHeadControl,
        registry: Registry,
        policies: LocalPolicyControl,
        publish: Callable[[], Awaitable[None]],
        welcome: asyncio.Event,
        files: Callable[[], dict[str, bytes]] = dict,
    ) -> None:
        self._control, self._worker, self._publish, self._welcome = control, worker, publish, welcome
        self._head_control, self._registry, self._policies, self._files = head_control, registry, policies, files
        self.in_step = asyncio.Event()
        """Set once the worker carries the policy that the others carry."""
        self.behind = "has not read yet which policy version the others carry"
        """Why it is not set."""

    async def run(self) -> None:
        """Until it is cancelled. While Redis is away it waits, and reads the heads folder afterwards: news may have
        been missed.
        """
        while True:
            try:
                place = await self._control.latest_news()  # before anything is read, so that no news fall in between
                await self._reload()
                while not self.in_step.is_set():
                    await asyncio.sleep(AGAIN_S)
                    await self._reload()
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._do_requests())
                    both.create_task(self._hear_news(place))
            except* Unavailable as group:
                # the queue tells of it once
                logs.event(LOG, "control_lost", severity=logging.DEBUG, reason=str(group.exceptions[0]))
                await asyncio.sleep(AGAIN_S)

    async def _do_requests(self) -> None:
        while True:
            await self._welcome.wait()
            if (asked := await self._control.next_request(self._worker)) is not None:
                key, request = asked
                await self._control.answer(key, codec.encode_map("answer", await self._answer(request)))

    async def _answer(self, request: bytes) -> dict[str, Any]:
        try:
            body = codec.decode_map(request, *VERBS)
            if body["is"] == "policy":
                return {"policy": await self._policies.show()}
            if body["is"] == tokenizer_files.VERB:
                return {"files": await asyncio.to_thread(self._files)}
            async with self._control.alone(self._worker, PATIENCE_S):
                answer = await self._do(body)
                await self._publish()
                await self._control.announce(RELOAD)
                return answer
        except codec.Unreadable as error:
            return _problem(
                Unavailable(f"worker {self._worker} does not understand this request ({error}): upgrade the workers")
            )
        except InwardError as error:
            return _problem(error)
        except Exception as error:
            logs.event(LOG, "request_failed", severity=logging.ERROR, error=error)
            return _problem(InternalError(f"the worker failed ({type(error).__name__})"))

    async def _do(self, body: dict[str, Any]) -> dict[str, Any]:
        if body["is"] == "switch_policy":
            return await self._switch_policy(codec.convert(body, SwitchPolicy).version)
        await asyncio.to_thread(self._registry.reload)  # what another worker did just now
        if body["is"] == "activate":
            switch = codec.convert(body, Activate)
            return {"head": asdict(await self._head_control.activate(switch.name, switch.version))}
        step = codec.convert(body, Update)
        return {"head": asdict(await self._head_control.update(step.name, step.sequence, step.pairs, lr=step.lr))}

    async def _switch_policy(self, version: str) -> dict[str, Any]:
        await self._follow()  # what another worker did just now
        shown = await self._policies.switch(version)
        await self._control.remember_policy(_remembered(self._policies.history))
        return {"policy": shown}

    async def _follow(self) -> None:
        kept = codec.decode_map(await self._control.policy(_remembered(self._policies.history)), "policy")
        await self._policies.follow([codec.convert(activation, Activation) for activation in kept["history"]])

    async def _hear_news(self, place: str) -> None:
        while True:
            place, came = await self._control.next_news(place)
            if came:
                await self._reload()

    async def _reload(self) -> None:
        try:
            await asyncio.to_thread(self._registry.reload)
        except InwardError as error:  # what is served stays as it was
            logs.event(LOG, "heads_not_reloaded", reason=error.message)
        try:
            await self._follow()
            self.in_step.set()
        except Unavailable:
            raise
        except InwardError as error:
            self.behind = f"cannot carry the policy version that the others carry: {error.message}"
            logs.event(LOG, "policy_not_followed", severity=logging.ERROR, reason=error.message)
        await self._publish()


def _remembered(history: History) -> bytes:
    return codec.encode_map("policy", {"history": [asdict(activation) for activation in history]})


def _problem(error: InwardError) -> dict[str, Any]:
    """An answer that says what went wrong."""
    return {"error": {"code": error.code, "message": error.message, "param": error.param}}
