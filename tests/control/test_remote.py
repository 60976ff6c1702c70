"""Head control of an API replica and the control agents of workers that share a heads folder, around a real Redis."""

import asyncio
from contextlib import AsyncExitStack
from types import SimpleNamespace

import numpy as np
import pytest

from inward import codec
from inward.backbones.fake import FakeBackbone
from inward.control.channel import UNLOCK, ControlChannel
from inward.control.heads import LocalHeadControl
from inward.control.lora_adapters import LocalPolicyControl, RemotePolicyControl
from inward.control.remote import ControlAgent, RemoteHeadControl, WorkerInfo
from inward.errors import Conflict, EngineDead, InvalidField, NotFound, Unavailable
from inward.heads import store
from inward.heads.base import BackboneRef, Manifest
from inward.heads.hybrid import HybridHead
from inward.heads.registry import Registry
from inward.prompts import Prompts, Texts
from inward.queues.redis.consumer import RedisConsumer
from inward.stores.connection import Connection
from inward.types import HeadRef
from support.adapters import write_adapter
from support.queues import KEYS, WORKER, endless, living
from support.tiny_tokenizer import tokenizer
from support.waiting import PATIENCE, until

LAYERS, WIDTH = 4, 16
PROMPTS = Prompts(tokenizer(), max_tokens=512)
PAIRS = [Texts(f"question {i}", (f"good {i}", f"bad {i}")) for i in range(4)]


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    fingerprint = FakeBackbone(LAYERS, WIDTH).info.fingerprint
    manifest = Manifest(
        name="hybrid", kind="hybrid", version=1, created="2025-01-01T00:00:00Z",
        template=PROMPTS.template, layers=(2, 4),
        backbone=BackboneRef(name="fake", fingerprint=fingerprint), options={"gate": "sigmoid"},
    )  # fmt: skip
    shapes = {"probe_weight": (2, WIDTH), "probe_bias": 2, "gate_weight": (2, 2), "mean": (2, WIDTH)}
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} | {
        "scale": np.ones((2, WIDTH), np.float32)
    }
    store.save(HybridHead.from_tensors(manifest, tensors), tmp_path / "hybrid")
    return tmp_path


class RunningWorker:
    """What a worker has for its agent."""

    def __init__(self, connection, folder, template=PROMPTS.template, keys=KEYS):
        backbone = FakeBackbone(LAYERS, WIDTH)
        self.registry = Registry.open(folder, info=backbone.info, template=PROMPTS.template)
        self.consumer = RedisConsumer(
            connection, keys, **WORKER, about=lambda: self.worker_info(backbone, template).encode()
        )
        head_control = LocalHeadControl(self.registry, backbone, PROMPTS)
        self.policies = LocalPolicyControl(backbone, folder / "adapters")
        self.agent = ControlAgent(
            ControlChannel(connection, KEYS),
            self.consumer.worker,
            head_control,
            self.registry,
            self.policies,
            self.consumer.publish,
            self.consumer.welcome,
        )

    def worker_info(self, backbone, template):
        return WorkerInfo(
            "1", backbone.info, backbone.policy_version, template, "tok", 512, tuple(self.registry.listing())
        )

    async def open(self):
        return asyncio.create_task(self.agent.run())


@pytest.fixture
async def replica(redis_server, folder, monkeypatch):
    """An API replica's head control; ``open_worker`` opens workers."""
    monkeypatch.setattr("inward.control.remote.FOLLOWED_S", PATIENCE)
    async with AsyncExitStack() as stack:
        connection = Connection(redis_server.url, timeout=PATIENCE)
        stack.push_async_callback(connection.close)
        head_control = RemoteHeadControl(ControlChannel(connection, KEYS), template=PROMPTS.template, tokenizer="tok")

        async def open(**options):
            worker = RunningWorker(connection, folder, **options)
            await stack.enter_async_context(living(worker.consumer))
            task = await worker.open()

            async def close():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

            stack.push_async_callback(close)
            return worker

        head_control.open_worker = open
        yield head_control


async def test_the_heads_are_those_of_the_workers_workers(replica):
    with pytest.raises(EngineDead, match="heard of"):
        replica.listing()
    worker = await replica.open_worker()
    await replica.refresh()
    assert replica.listing() == worker.registry.listing()
    assert replica.resolve(None, ("legend", "hybrid")) == HeadRef("hybrid", "hybrid", 1)
    assert replica.show("hybrid")["versions"] == [1]
    with pytest.raises(NotFound, match="loaded: hybrid"):
        replica.show("nope")


async def test_an_update_by_one_worker_is_served_by_all_when_the_answer_comes_and_a_repeat_changes_nothing(replica):
    workers = [await replica.open_worker() for _ in range(3)]
    await replica.refresh()
    for sequence in (1, 2, 3):
        ref = await replica.update("hybrid", sequence, PAIRS, lr=1e-2)
        assert ref == HeadRef("hybrid", "hybrid", sequence + 1)
        assert [worker.registry.snapshot().heads["hybrid"].ref.version for worker in workers] == [sequence + 1] * 3
        assert await replica.update("hybrid", sequence, PAIRS, lr=1e-2) == ref
    assert replica.show("hybrid")["versions"] == [1, 2, 3, 4]
    assert await replica.activate("hybrid", 2) == HeadRef("hybrid", "hybrid", 2)
    assert [worker.registry.snapshot().heads["hybrid"].ref.version for worker in workers] == [2] * 3


async def test_updates_sent_at_once_are_applied_one_by_one(replica):
    workers = [await replica.open_worker() for _ in range(3)]
    await replica.refresh()
    answers = await asyncio.gather(*(replica.update("hybrid", 1, PAIRS, lr=1e-2) for _ in range(6)))
    assert set(answers) == {HeadRef("hybrid", "hybrid", 2)}
    assert workers[0].registry.versions("hybrid") == [1, 2]


async def test_a_worker_that_comes_while_a_head_is_switched_misses_nothing(replica, monkeypatch):
    first = await replica.open_worker()
    await replica.refresh()
    await replica.update("hybrid", 1, PAIRS, lr=1e-2)
    latest = ControlChannel.latest_news

    async def switched_just_before(control):
        monkeypatch.setattr(ControlChannel, "latest_news", latest)
        await first.agent._answer(codec.encode_map("activate", {"name": "hybrid", "version": 1}))
        return await latest(control)

    monkeypatch.setattr(ControlChannel, "latest_news", switched_just_before)
    second = await replica.open_worker()
    await until(lambda: second.registry.snapshot().heads["hybrid"].ref.version == 1)


async def test_errors_come_back_as_themselves(replica):
    await replica.open_worker()
    await replica.refresh()
    with pytest.raises(Conflict, match="expects update sequence 1, not 5"):
        await replica.update("hybrid", 5, PAIRS, lr=1e-2)
    with pytest.raises(NotFound, match="no version 9"):
        await replica.activate("hybrid", 9)
    with pytest.raises(InvalidField):
        await replica.update("hybrid", 1, [Texts([{"role": "nobody", "content": "x"}], ("a", "b"))], lr=1e-2)


async def test_a_policy_is_carried_by_all_workers_when_the_answer_comes_and_by_those_to_come(replica, folder):
    for name in ("v1", "v2"):
        write_adapter(folder / "adapters" / name)
    workers = [await replica.open_worker() for _ in range(3)]
    await replica.refresh()
    policies = RemotePolicyControl(replica)
    for version in ("v1", "v2", "base", "v1", "v1"):
        shown = await policies.switch(version)
        assert [worker.policies.history[-1].policy_version for worker in workers] == [version] * 3
        assert {worker_info.policy_version for worker_info in replica.workers.values()} == {version}
    assert await policies.show() == shown
    assert [activation["policy_version"] for activation in shown["history"]] == ["base", "v1", "v2", "base", "v1"]
    late = await replica.open_worker()
    async with asyncio.timeout(PATIENCE):
        await late.agent.in_step.wait()
    assert late.policies.history == workers[0].policies.history
    with pytest.raises(NotFound, match="available: v1, v2"):
        await policies.switch("v3")
    assert (await policies.show())["policy_version"] == "v1"


async def test_a_worker_that_cannot_carry_the_policy_of_the_others_is_not_in_step_until_it_can(replica, folder):
    adapter = write_adapter(folder / "adapters" / "v1")
    await replica.open_worker()
    await replica.refresh()
    await RemotePolicyControl(replica).switch("v1")
    adapter.rename(folder / "adapters" / "away")
    late = await replica.open_worker()
    await until(lambda: "no adapter 'v1'" in late.agent.behind)
    assert not late.agent.in_step.is_set()
    (folder / "adapters" / "away").rename(adapter)
    async with asyncio.timeout(PATIENCE):
        await late.agent.in_step.wait()
    assert late.policies.history[-1].policy_version == "v1"


async def test_workers_with_another_template_are_not_counted_and_the_reason_is_said(replica):
    await replica.open_worker(template="format:{prompt}###{response}")
    await replica.refresh()
    assert replica.workers == {}
    with pytest.raises(EngineDead, match="another template"):
        await replica.activate("hybrid", 1)


async def test_a_redis_that_is_away_is_a_503(own_redis):
    server = own_redis()
    connection = Connection(server.url, timeout=1)
    server.kill()
    with pytest.raises(Unavailable, match="can't be reached"):
        await ControlChannel(connection, KEYS).ask(b"", 1.0)
    await connection.close()


class Foreign:
    """A replica of another version, which asks in its own words."""

    def __init__(self, replica):
        self.channel = replica._control

    async def ask(self, verb, **arguments):
        answer = await self.channel.ask(codec.encode_map(verb, arguments), PATIENCE)
        return codec.decode_map(answer, "answer")


async def test_fields_that_a_worker_does_not_know_change_nothing(replica):
    worker = await replica.open_worker()
    await replica.refresh()
    answer = await Foreign(replica).ask("activate", name="hybrid", version=1, reason="because", more={"a": [1]})
    assert answer["head"]["version"] == 1
    pairs = [{"prompt": "p", "responses": ["a", "b"], "weight": 2.0}]
    assert (await Foreign(replica).ask("update", name="hybrid", sequence=1, pairs=pairs, lr=0.01, mu=1.0))["head"]
    history = [{"policy_version": "base", "activated": "2025-01-01T00:00:00.000Z", "by": "somebody"}]
    await replica._control.remember_policy(codec.encode_map("policy", {"history": history, "since": 1}))
    await replica._control.announce(b"something else")
    await until(lambda: worker.policies.history[-1].activated.startswith("2025-01-01"))
    assert (await replica.activate("hybrid", 1)).version == 1


@pytest.mark.parametrize(
    ("verb", "arguments", "said"),
    [
        ("unload", {"name": "hybrid"}, "upgrade the workers"),
        ("activate", {"name": "hybrid"}, "version"),
        ("activate", {"name": "hybrid", "version": "two"}, "version"),
        ("update", {"name": "hybrid", "sequence": 1, "pairs": [{"prompt": 1}], "lr": 0.1}, "upgrade the workers"),
    ],
)
async def test_what_a_worker_does_not_understand_is_answered_with_an_error_and_it_goes_on(
    replica, verb, arguments, said
):
    await replica.open_worker()
    await replica.refresh()
    error = (await Foreign(replica).ask(verb, **arguments))["error"]
    assert (error["code"], said in error["message"]) == ("unavailable", True), error
    with pytest.raises(Unavailable, match="does not understand"):
        await replica.ask(verb, arguments)
    assert (await replica.activate("hybrid", 1)).version == 1


async def test_an_entry_that_is_no_request_is_skipped(replica):
    await replica.open_worker()
    await replica.refresh()
    redis = replica._control._redis
    for fields in (("a", "b"), ("answer", "x", "request", b"y", "until", "never"), ("answer", b"\xff", "until", 9e9)):
        await redis("XADD", KEYS.requests, "*", *fields)
    assert (await replica.activate("hybrid", 1)).version == 1


async def test_a_worker_of_a_newer_version_is_understood_and_one_that_is_not_says_why(replica):
    worker = await replica.open_worker()
    newer = codec.decode_map(worker.consumer._about(), "worker_info")
    newer["backbone"]["quantised"] = True
    newer |= {"gpu": "B300", "heads": [row | {"owner": "me"} for row in newer["heads"]]}
    worker.consumer._about = lambda: codec.encode_map("worker_info", newer)
    await worker.consumer.publish()
    await replica.refresh()
    assert replica.resolve(None, ("hybrid",)).version == 1
    worker.consumer._about = lambda: codec.encode_map("worker_info", newer | {"heads": [{"name": "hybrid"}]})
    await worker.consumer.publish()
    await replica.refresh()
    with pytest.raises(EngineDead, match="not a HeadRef"):
        replica.resolve(None, ("hybrid",))


async def test_redis_keeps_nothing_of_requests_that_were_done_and_everything_has_an_end(replica, redis_server):
    await replica.open_worker()
    await replica.refresh()
    for sequence in range(1, 5):
        await replica.update("hybrid", sequence, PAIRS, lr=1e-2)
    with redis_server.client() as client:
        assert client.xlen(KEYS.requests) == 0
        assert client.exists(KEYS.lock) == 0
        assert endless(client) == []


async def test_a_request_that_no_worker_took_is_forgotten(replica, redis_server, monkeypatch):
    monkeypatch.setattr("inward.control.channel.STALE_S", 60)
    with redis_server.client() as client:
        client.xadd(KEYS.requests, {"request": b"x" * 10**6}, id="1000-0")  # in 1970
        with pytest.raises(Unavailable, match="no worker answered"):
            await replica._control.ask(b"", 0.01)
        assert client.xlen(KEYS.requests) == 1
        assert 0 < client.ttl(KEYS.requests) <= 60


async def test_less_than_a_millisecond_is_no_wait_without_end(replica, monkeypatch):
    clock = iter([100.0, 100.0])
    monkeypatch.setattr("inward.control.channel.time", SimpleNamespace(time=lambda: next(clock, 200.0)))
    with pytest.raises(Unavailable, match="no worker answered"):
        await asyncio.wait_for(replica._control.ask(b"", 1e-4), PATIENCE / 2)


async def test_the_lock_is_held_as_long_as_it_is_needed_and_no_longer(replica, redis_server):
    channel, inside = replica._control, []

    async def change(name, seconds):
        async with channel.alone(name, 0.3):
            inside.append(name)
            await asyncio.sleep(seconds)
            inside.append(name)

    await asyncio.gather(change("slow", 1.0), change("other", 0.0))  # longer than the lock lives without renewal
    assert inside in (["slow", "slow", "other", "other"], ["other", "other", "slow", "slow"])
    with redis_server.client() as client:
        client.set(KEYS.lock, "of a worker that died", px=200)
        await asyncio.wait_for(change("heir", 0.0), PATIENCE)
        client.set(KEYS.lock, "taken over", px=60_000)
        await channel._redis.script(UNLOCK, [KEYS.lock], ["heir"])
        assert client.get(KEYS.lock) == b"taken over"


async def test_workers_of_different_weights_are_shown_and_refused(replica, redis_server):
    """As where an older worker, which knows nothing of the queue's backbone, stands in the same queue."""
    worker = await replica.open_worker()
    other = codec.decode_map(worker.consumer._about(), "worker_info")
    other["backbone"]["dtype"] = "bfloat16"
    with redis_server.client() as client:
        client.zadd(KEYS.workers, {"stranger": 9e15})
        client.set(KEYS.worker("stranger"), codec.encode_map("worker_info", other), px=60_000)
    await replica.refresh()
    with pytest.raises(EngineDead, match=r"different weights or dtypes .*bfloat16"):
        replica.resolve(None, ("hybrid",))


async def test_a_worker_of_another_backbone_does_no_requests(replica):
    await replica.open_worker()
    stranger = await replica.open_worker(keys=KEYS.of("sha256:other:float32"))
    assert not stranger.consumer.welcome.is_set()
    await replica.refresh()
    asked = []
    stranger.agent._do = asked.append
    for sequence in range(1, 6):
        assert (await replica.update("hybrid", sequence, PAIRS, lr=1e-2)).version == sequence + 1
    assert asked == []
