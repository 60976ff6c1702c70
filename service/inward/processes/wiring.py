"""Settings → concrete objects: the only place that knows which parts the house is made of."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inward import __version__, logs
from inward.api.elements import RERANK_KINDS, SCORE_KINDS
from inward.api.keys import KeyRing
from inward.api.services import Limits
from inward.backbones import vllm
from inward.backbones.base import Backbone
from inward.backbones.fake import FakeBackbone
from inward.backbones.gguf.cache import cache_root
from inward.backbones.loading import SMOLLM2, NoTokenizerHere, name_of, resolve
from inward.control import tokenizer_files
from inward.control.channel import ControlChannel
from inward.control.lora_adapters import LocalPolicyControl
from inward.errors import HeadError, InvalidField, InwardError, NotFound, SetupError
from inward.files import whole_folder
from inward.heads import store
from inward.heads.hub import HubHeads, fetch
from inward.heads.registry import Registry, choose
from inward.prompts import Prompts
from inward.queues.redis.consumer import RedisConsumer
from inward.queues.redis.producer import RedisProducer
from inward.queues.redis.sharded import ShardedConsumer, ShardedProducer
from inward.settings import Settings
from inward.stores.connection import Connection
from inward.stores.keys import Keys
from inward.types import BASE, BackboneInfo, Group, HeadRef, Kind

LOG = logs.logger("processes")
LET_GO_S = 30.0
"""That a device may take to finish what it has, after nobody waits for it any more."""
MODELS = Path(__file__).parents[1] / "models"
"""What comes with Inward: heads for some models, and one small model."""
TOY = MODELS / "toy"
ANSWERING: Mapping[str, Sequence[Kind]] = {
    "rerank_head": RERANK_KINDS, "compat_head": RERANK_KINDS, "guard_head": SCORE_KINDS,
}  # fmt: skip
"""Settings that name a head, and of which kinds it may be."""
AnyProducer = RedisProducer | ShardedProducer
AnyConsumer = RedisConsumer | ShardedConsumer


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where the backbone's files are, and what to call it."""

    folder: Path
    name: str
    revision: str


def find_model(settings: Settings, *, weights: bool = True) -> ModelFiles:
    """The folder of ``settings.model``; fetched from the hub where it is neither a folder nor in the hub's cache, and
    converted where it is a GGUF file. Without ``weights`` the hub is asked for the tokenizer and the settings only.

    Raises:
        SetupError: there is no such model.
    """
    name = model_name(settings)
    if settings.model == TOY.name:
        return ModelFiles(TOY / "backbone", name, __version__)
    folder = resolve(settings.model, settings.revision, settings.dtype, settings.device, weights=weights)
    return ModelFiles(folder, name, settings.revision or "")


async def find_tokenizer(settings: Settings, connection: Connection) -> ModelFiles:
    """As ``find_model`` without weights; of a GGUF file that has not been converted here, what a worker sends.

    Raises:
        SetupError: there is no such model.
    """
    try:
        return find_model(settings, weights=False)
    except NoTokenizerHere:
        name = model_name(settings)
        control = ControlChannel(connection, Keys(settings.queue or name))
        folder = await tokenizer_files.fetch(control, cache_root() / "tokenizers")
        return ModelFiles(folder, name, settings.revision or "")


def model_name(settings: Settings) -> str:
    """What the model of the settings is called, by which also its queue is found.

    Raises:
        SetupError: it is called otherwise by now.
    """
    if settings.model == "demo":
        raise SetupError(f"the model demo is called {TOY.name} now: --model {TOY.name}")
    return name_of(settings.model)


def open_backbone(settings: Settings, model: ModelFiles, *, serving: bool = False) -> Backbone:
    """Loads the model. ``auto`` takes vLLM for serving only: for reading whole states transformers is the better one.

    Raises:
        SetupError: it can't be loaded, and why.
    """
    if settings.backbone == "fake":
        from inward.backbones.fingerprint import fingerprint

        config = json.loads((model.folder / "config.json").read_text())
        return FakeBackbone(
            config["num_hidden_layers"], config["hidden_size"], max_tokens=config["max_position_embeddings"],
            fingerprint=fingerprint(model.folder), tokens=settings.token_budget or 4096,
        )  # fmt: skip
    if settings.backbone == "vllm" or (settings.backbone == "auto" and serving and vllm.preferred(settings.device)):
        return vllm.open_backbone(
            model.folder, name=model.name, revision=model.revision, dtype=settings.dtype, device=settings.device,
            token_budget=settings.token_budget, options=settings.vllm_options, adapters=settings.adapters is not None,
            trust_remote_code=settings.trust_remote_code,
        )  # fmt: skip
    from inward.backbones.transformers.backbone import TransformersBackbone

    return TransformersBackbone(
        model.folder, name=model.name, revision=model.revision, dtype=settings.dtype, device=settings.device,
        token_budget=settings.token_budget, trust_remote_code=settings.trust_remote_code,
    )  # fmt: skip


def open_prompts(settings: Settings, model: ModelFiles, max_tokens: int) -> Prompts:
    """The templates and the tokenizer of the model."""
    from inward.backbones.end_ids import end_ids, ending_configs
    from inward.backbones.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model.folder)
    ends = end_ids(tokenizer, *ending_configs(model.folder))
    limit = min(max_tokens, settings.max_tokens or max_tokens)
    return Prompts(tokenizer, max_tokens=limit, format=settings.template, end_ids=ends)


@asynccontextmanager
async def opened_model(settings: Settings) -> AsyncIterator[tuple[Backbone, Prompts]]:
    """The model of the settings, and how prompts are rendered for it.

    Raises:
        SetupError: it can't be loaded, and why.
    """
    model = find_model(settings)
    backbone = open_backbone(settings, model)
    try:
        yield backbone, open_prompts(settings, model, backbone.info.max_tokens)
    finally:
        await backbone.close()


def heads_folder(settings: Settings) -> Path | None:
    """Where heads are read from and new versions are written to.

    Bundled heads, and those of a hub, are copied to the user's state folder first, so that updates survive a restart
    and never change the package or the cache. The copy's name holds a hash of what was copied: other heads that come
    with a later release, or a checkout, are served then, and updates of the former ones stay where they are.

    Raises:
        SetupError: the hub has no such heads.
    """
    state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "inward"
    if settings.heads is not None:
        address = HubHeads.parse(settings.heads)
        return settings.heads.expanduser() if address is None else fetch(address, state / "hub")
    bundled = MODELS / settings.model / "heads"
    if settings.model not in (TOY.name, SMOLLM2) or not bundled.is_dir():
        return None
    folder = state / f"{settings.model}-heads-{_hash(bundled)}"
    if not folder.is_dir():
        with whole_folder(folder) as fresh:
            shutil.copytree(bundled, fresh, dirs_exist_ok=True)
    return folder


def bundled_for(identity: str) -> str | None:
    """The bundled model that has this fingerprint."""
    for name in (TOY.name, SMOLLM2):
        for found in store.find(MODELS / name / "heads"):
            if store.load_manifest(found.path).backbone.fingerprint == identity:
                return name
    return None


def _hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()} {file.stat().st_size}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def check_heads(settings: Settings) -> None:
    """What can be known of the heads before the model is loaded, which takes longer.

    Raises:
        SetupError: there is no such folder, a manifest in it can't be used, or a head that shall answer is not there.
    """
    folder = heads_folder(settings)
    if settings.heads is not None and (folder is None or not folder.is_dir()):
        raise SetupError(
            f"there is no folder of heads at {folder}: fit some with `inward fit … --out`, or correct --heads"
        )
    found = [] if folder is None else store.find(folder)
    refs = {one.name: HeadRef(one.name, one.kind, one.version) for one in found}
    for setting, kinds in ANSWERING.items():
        if (name := getattr(settings, setting)) is not None:
            try:
                choose(refs, name, kinds)
            except NotFound as error:
                raise SetupError(f"--{setting.replace('_', '-')}: {error.message}") from None


def limits(settings: Settings) -> Limits:
    """What a request may ask for, but the length of its texts, which ``Prompts.max_tokens`` alone says: it changes
    with the workers.
    """
    return Limits(
        body_bytes=settings.max_body_bytes, upload_bytes=settings.max_upload_bytes, body_s=settings.body_timeout,
        items=settings.max_items, candidates=settings.max_candidates, timeout_s=settings.timeout,
    )  # fmt: skip


def rules(settings: Settings) -> dict[str, Any]:
    """What of ``Services`` the settings say by themselves: who may call, for how much, and which heads answer.

    Raises:
        SetupError: the file of keys can't be used.
    """
    return {
        "keys": KeyRing({key.get_secret_value() for key in settings.api_keys}, settings.api_keys_file),
        "limits": limits(settings), "tokens_a_minute": settings.quota, "metrics_open": settings.metrics_open,
        "rerank_head": settings.rerank_head, "compat_head": settings.compat_head, "guard_head": settings.guard_head,
        "false_positives": settings.false_positives,
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Loaded:
    """A backbone with what belongs to it."""

    backbone: Backbone
    prompts: Prompts
    registry: Registry
    policies: LocalPolicyControl


async def load(settings: Settings, model: ModelFiles) -> Loaded:
    """Loads the model, the adapter to begin with, and the heads.

    Raises:
        SetupError: something does not fit; nothing is left open.
    """
    check_heads(settings)
    return await equip(settings, model, open_backbone(settings, model, serving=True))


async def equip(settings: Settings, model: ModelFiles, backbone: Backbone) -> Loaded:
    """What belongs to a backbone that is open: templates, heads, the adapter to begin with.

    Raises:
        SetupError: something does not fit; the backbone is closed.
    """
    backbone.info = replace(backbone.info, folder=str(model.folder), concurrency=backbone.capacity.concurrency)
    try:
        prompts = open_prompts(settings, model, backbone.info.max_tokens)
        folder = heads_folder(settings)
        registry = Registry.open(folder, info=backbone.info, template=prompts.template)
        await read_once(backbone, registry)
        return Loaded(backbone, prompts, registry, await open_policies(settings, backbone))
    except BaseException:
        await backbone.close()
        raise


async def read_once(backbone: Backbone, registry: Registry) -> None:
    """Each active head reads a made-up text, so that one which this backbone can't be read for is refused now.

    Raises:
        HeadError: one can't be, and why.
    """
    for name, head in registry.snapshot().heads.items():
        try:
            await backbone.read([Group((1, 2), ((3,),))], [head.readout])
        except InvalidField as error:
            raise HeadError(f"head {name!r} can't be read on {backbone.info.name}: {error.message}") from error


async def open_policies(settings: Settings, backbone: Backbone) -> LocalPolicyControl:
    """The adapters of the settings, one of them loaded.

    Raises:
        SetupError: it can't be loaded.
    """
    policies = LocalPolicyControl(backbone, settings.adapters)
    if settings.policy != BASE:
        try:
            await policies.begin(settings.policy)
        except InwardError as error:
            raise SetupError(f"--policy {settings.policy}: {error.message}") from error
    return policies


def about(
    info: BackboneInfo,
    policy_version: str,
    prompts: Prompts,
    heads: list[str],
    settings: Settings,
    *,
    jobs: bool = False,
) -> dict[str, Any]:
    """What ``GET /info`` answers."""
    bounds = limits(settings)
    return {
        "version": __version__, "model": info.name, "revision": info.revision, "path": info.folder,
        "fingerprint": info.fingerprint, "concurrency": info.concurrency,
        "policy_version": policy_version, "dtype": info.dtype, "device": info.device, "layers": info.layers,
        "width": info.width, "template": prompts.template, "heads": heads, "jobs": jobs,
        "limits": {
            "body_bytes": bounds.body_bytes, "items": bounds.items, "candidates": bounds.candidates,
            "tokens": prompts.max_tokens, "timeout_seconds": bounds.timeout_s, "queue_tokens": settings.queue_tokens,
        },
    }  # fmt: skip


async def drain(working: asyncio.Task[None], timeout: float) -> bool:
    """Waits for a worker's loop to end by itself, for at most ``timeout`` seconds; whether it did."""
    done, _ = await asyncio.wait([working], timeout=timeout)
    if not done:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
    return bool(done)


async def let_go(backbone: Backbone) -> bool:
    """Gives the device back; False where that does not come to an end, since a call in flight doesn't."""
    try:
        async with asyncio.timeout(LET_GO_S):
            await backbone.close()
    except TimeoutError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class RedisServers:
    """The Redis servers of a queue; mostly one. The first is the home of all that is no job."""

    connections: tuple[Connection, ...]

    @property
    def home(self) -> Connection:
        return self.connections[0]

    def producer(self, keys: Keys, *, max_tokens: int, beat: float = 1.0, ttl: float = 10.0) -> AnyProducer:
        """A replica's side of the queue."""
        if len(self.connections) == 1:
            return RedisProducer(self.home, keys, max_tokens=max_tokens, beat=beat, ttl=ttl)
        return ShardedProducer(self.connections, keys, max_tokens=max_tokens, beat=beat, ttl=ttl)

    def consumer(self, keys: Keys, settings: Settings, about: Callable[[], bytes]) -> AnyConsumer:
        """A worker's side of the queue."""
        options: dict[str, Any] = {"idle": settings.claim_idle, "max_deliveries": settings.max_deliveries}
        options |= {"ttl": settings.presence, "about": about}
        if len(self.connections) == 1:
            return RedisConsumer(self.home, keys, **options)
        return ShardedConsumer(self.connections, keys, **options)

    async def check(self) -> None:
        """As a connection's, for each."""
        for connection in self.connections:
            await connection.check()

    async def close(self) -> None:
        """Closes the sockets."""
        for connection in self.connections:
            await connection.close()


def connect(settings: Settings) -> RedisServers:
    """The Redis of the settings, or the several.

    Raises:
        SetupError: none is set, or not by a URL that can be used, or one twice.
    """
    urls = settings.redis_urls or ((settings.redis_url,) if settings.redis_url else ())
    if settings.redis_urls and settings.redis_url:
        raise SetupError("the Redis is named twice: give --redis-url or --redis-urls")
    if not urls:
        raise SetupError("API replicas and workers meet in a Redis: name it with --redis-url or INWARD_REDIS_URL")
    if len(set(urls)) < len(urls):
        raise SetupError("one Redis is named twice in --redis-urls: each shard is a server of its own")
    names = [f"shard {i + 1} of --redis-urls" for i in range(len(urls))] if settings.redis_urls else ["--redis-url"]
    return RedisServers(tuple(Connection(url, name=name) for url, name in zip(urls, names, strict=True)))


def served_as(loaded: Loaded) -> str:
    """Equal for workers that may answer as one service: what a prompt becomes, and the numbers that it is given."""
    template = hashlib.sha256(loaded.prompts.template.encode()).hexdigest()[:8]
    return f"{loaded.backbone.info.identity}:{template}"


def describe(settings: Settings) -> dict[str, Any]:
    """The resolved settings, without loading the model: what ``inward info`` prints."""
    from inward.backbones.fingerprint import fingerprint

    model = find_model(settings)
    identity = fingerprint(model.folder)
    folder = heads_folder(settings)
    values = settings.resolved()
    of_backbone = ("dtype", "device", "token_budget", "vllm_options", "trust_remote_code", "template")
    backbone = {name: values.pop(name) for name in of_backbone}
    backbone |= {"kind": values.pop("backbone"), "name": model.name, "path": str(model.folder), "fingerprint": identity}
    bounds = [name for name in values if name.startswith("max_") or name in ("queue_tokens", "timeout")]
    limits = {name: values.pop(name) for name in bounds}
    values.pop("heads")
    heads = str(folder) if folder else None
    return {"version": __version__, "backbone": backbone, "heads": heads, "limits": limits, **values}
