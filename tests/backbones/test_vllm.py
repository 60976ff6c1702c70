"""vLLM against the transformers backbone, in float32, on a tiny model, with chunked prefill and a prefix cache that
has to evict."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import transformers

from api.test_stream import events, hang_up_after
from support import parity
from support.corridor import FakeHead, FakeRegistry
from support.fake_services import FakeServices
from support.parity import (
    EAGER,
    EVERY_MAPPED_TAP,
    EVERY_TAP,
    LAYERS,
    OPTIONS,
    TOLERANCE,
    WIDTH,
    ids,
    one_a_tap,
    random_group,
    read,
    together,
    worst_error,
)
from support.waiting import PATIENCE, until

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm does it", exc_type=ImportError)

from inward.api.app import create_app
from inward.api.services import Limits
from inward.backbones.base import first_alike
from inward.backbones.transformers.backbone import TransformersBackbone
from inward.backbones.vllm.backbone import VllmBackbone
from inward.backbones.vllm.engine import _arguments
from inward.backbones.vllm.protocol import HELD, NORM, TABLE_COLUMNS
from inward.engine import Engine
from inward.errors import EngineDead, InvalidField, SetupError
from inward.intake import Intake
from inward.queues.memory import MemoryQueue
from inward.types import Group, Readout, SamplingSpec, Tap
from inward.worker import Worker

RNG = np.random.default_rng(0)
HEADS = (
    Readout(
        (
            Tap(2, "last", RNG.normal(size=(WIDTH, 1)).astype(np.float32)),
            Tap(3, "mean", RNG.normal(size=(WIDTH, 2)).astype(np.float32)),
        )
    ),
    Readout(tuple(Tap(layer, "prompt", RNG.normal(size=(WIDTH, 3)).astype(np.float32)) for layer in (1, LAYERS))),
)
WITH_EOS = (*HEADS, Readout((Tap(LAYERS, "eos", RNG.normal(size=(WIDTH, 2)).astype(np.float32)),)))
DATA = Path(__file__).parents[2] / "../shared/data/hh_harmless_pairs.jsonl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parity.save(transformers.Qwen2Config, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> TransformersBackbone:
    return TransformersBackbone(folder, name="tiny", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def engines(folder: Path) -> Iterator[list[VllmBackbone]]:
    opened: list[VllmBackbone] = []
    yield opened
    for backbone in opened:
        asyncio.run(backbone.close())


@pytest.fixture
def backbone(folder: Path, engines: list[VllmBackbone]) -> VllmBackbone:
    """One engine for all tests, since it takes half a minute to start; a new one after the test that kills it."""
    if not engines or not engines[-1].healthy():
        engines.append(VllmBackbone(folder, name="tiny", dtype="float32", options=EAGER))
    return engines[-1]


def held(backbone: VllmBackbone) -> list[int]:
    return asyncio.run(backbone._engine.call(lambda: backbone._engine.rpc(HELD)))


def test_every_layer_and_position_equals_transformers_also_from_the_prefix_cache(
    backbone: VllmBackbone, reference: TransformersBackbone
) -> None:
    rng = np.random.default_rng(1)
    groups = [random_group(rng, n) for n in (1, 2, 5)] + [
        Group(ids(rng, 40), ((), ids(rng, 1), ids(rng, 33), ids(rng, 33)))
    ]
    readouts = one_a_tap(EVERY_MAPPED_TAP)
    truth = read(reference, groups, readouts, tokens=True)
    fresh = read(backbone, groups, readouts, tokens=True)
    cached = read(backbone, groups, readouts, tokens=True)
    assert worst_error(fresh, truth) <= TOLERANCE
    assert worst_error(cached, truth) <= TOLERANCE
    assert sum(r.cached_tokens for r in cached) > sum(r.cached_tokens for r in fresh)


def test_whole_states_are_read_without_a_table_for_every_cached_token(
    backbone: VllmBackbone, reference: TransformersBackbone
) -> None:
    rng = np.random.default_rng(8)
    groups = [random_group(rng, n) for n in (1, 2, 5)]
    readouts = one_a_tap(EVERY_TAP)
    truth = read(reference, groups, readouts, tokens=True)
    number = backbone._table.number
    for _ in range(2):
        assert worst_error(read(backbone, groups, readouts, tokens=True), truth) <= TOLERANCE
    group = Group(ids(rng, 20), sampling=SamplingSpec(3, max_tokens=8))
    samples, reading = asyncio.run(backbone.sample_and_read(group, readouts))
    finished = Group(group.prompt_ids, tuple(sample.ids for sample in samples))
    assert worst_error([reading], read(reference, [finished], readouts)) <= TOLERANCE
    assert backbone._table.number == number
    read(backbone, groups, HEADS)
    assert held(backbone) == [0, 0, 0]


def test_an_eos_is_read_without_a_session_whether_it_was_drawn_or_not(
    backbone: VllmBackbone, reference: TransformersBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbone._generation, "sessions", False)  # as on a GPU
    rng = np.random.default_rng(9)
    drawing = [Group(ids(rng, 12), sampling=SamplingSpec(8, max_tokens=n, seed=n)) for n in (1, 7, 120)]

    async def draw() -> list[Any]:
        return await asyncio.gather(*(backbone.sample_and_read(group, WITH_EOS, tokens=True) for group in drawing))

    drawn = asyncio.run(draw())
    assert {sample.finish_reason for samples, _ in drawn for sample in samples} == {"stop", "length"}
    finished = [
        Group(group.prompt_ids, tuple(sample.ids for sample in samples))
        for group, (samples, _) in zip(drawing, drawn, strict=True)
    ]
    truth = read(reference, finished, WITH_EOS, tokens=True)
    assert worst_error([reading for _, reading in drawn], truth) <= TOLERANCE
    assert held(backbone) == [0, 0, 0]


def test_real_texts_equal_transformers_while_other_requests_sample(
    backbone: VllmBackbone, reference: TransformersBackbone, folder: Path
) -> None:
    if not DATA.is_file():
        pytest.skip(f"the project's data is not here ({DATA.name} beside the repository, in shared/data)")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in DATA.read_text().splitlines()[:100]]
    encode = lambda text, limit: tuple(tokenizer.encode(text, add_special_tokens=False)[:limit])  # noqa: E731
    groups = [
        Group(encode(row["prompt"], 350), (encode(row["chosen"], 250), encode(row["rejected"], 250))) for row in rows
    ]
    drawing = [Group(group.prompt_ids[:50], sampling=SamplingSpec(2, max_tokens=60)) for group in groups[:20]]
    truth = read(reference, groups, WITH_EOS, tokens=True)
    got, *_ = together(
        lambda: backbone.read(groups, WITH_EOS, tokens=True),
        *(lambda group=group: backbone.sample_and_read(group, WITH_EOS) for group in drawing),  # type: ignore[misc]
    )
    assert worst_error(got, truth) <= TOLERANCE


def test_concurrent_calls_get_their_own_answers_while_heads_change(
    backbone: VllmBackbone, reference: TransformersBackbone
) -> None:
    rng = np.random.default_rng(2)
    groups = [random_group(rng, int(rng.integers(1, 4))) for _ in range(40)]
    readouts = [
        (Readout((Tap(2, "mean", rng.normal(size=(WIDTH, 2)).astype(np.float32)),)), HEADS[0]) for _ in range(4)
    ]
    reads = [lambda g=g, i=i: backbone.read([g], readouts[i % 4]) for i, g in enumerate(groups)]  # type: ignore[misc]
    answers = together(*reads)
    for i, (group, answer) in enumerate(zip(groups, answers, strict=True)):
        assert worst_error(answer, read(reference, [group], readouts[i % 4])) <= TOLERANCE
    assert held(backbone)[:2] == [0, 0]


def test_a_prompt_is_computed_once_for_its_responses_and_costs_are_told(backbone: VllmBackbone) -> None:
    rng = np.random.default_rng(3)
    group = Group(ids(rng, 256), tuple(ids(rng, 40) for _ in range(8)))
    (result,) = read(backbone, [group], HEADS)
    assert result.computed_tokens + result.cached_tokens == 8 * (256 + 40)
    assert result.computed_tokens <= 1.15 * (256 + 8 * 40)


def test_equal_responses_are_computed_once_and_read_alike(backbone: VllmBackbone) -> None:
    rng = np.random.default_rng(4)
    a, b = ids(rng, 20), ids(rng, 20)
    (result,) = read(backbone, [Group(ids(rng, 5), (a, b, a))], HEADS)
    assert result.computed_tokens + result.cached_tokens == 2 * 25
    np.testing.assert_array_equal(result.readings[0].values_NK[0], result.readings[0].values_NK[2])


def test_what_does_not_exist_reads_as_nan_and_harms_no_neighbour(backbone: VllmBackbone) -> None:
    nothing, something = read(
        backbone, [Group((), ((5, 6), ())), Group((7, 8), ((9,),))], one_a_tap([Tap(1, "prompt"), Tap(1, "last")])
    )
    assert np.isnan(nothing.readings[0].values_NK).all()
    assert np.isfinite(nothing.readings[1].values_NK[0]).all()
    assert np.isnan(nothing.readings[1].values_NK[1]).all()
    assert all(np.isfinite(reading.values_NK).all() for reading in something.readings)
    (empty,) = read(backbone, [Group((), ((),))], HEADS)
    assert np.isnan(empty.readings[0].values_NK).all()


@pytest.mark.parametrize("stop", [(), ("he",)], ids=["", "stop string"])
@pytest.mark.parametrize("readouts", [HEADS, WITH_EOS], ids=["last", "eos"])
def test_states_read_in_the_pass_that_draws_equal_those_of_the_finished_text(
    readouts: Sequence[Readout], stop: tuple[str, ...], backbone: VllmBackbone, reference: TransformersBackbone
) -> None:
    rng = np.random.default_rng(5)
    group = Group(ids(rng, 45), sampling=SamplingSpec(16, max_tokens=24, seed=11, stop=stop))
    samples, reading = asyncio.run(backbone.sample_and_read(group, readouts, tokens=True))
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    finished = Group(group.prompt_ids, tuple(sample.ids for sample in samples))
    assert worst_error([reading], read(reference, [finished], readouts, tokens=True)) <= TOLERANCE
    assert worst_error([reading], read(backbone, [finished], readouts, tokens=True)) <= TOLERANCE
    assert samples == asyncio.run(backbone.sample(group))
    assert held(backbone)[:2] == [0, 0]


def test_reading_while_drawing_computes_little_beyond_the_drawing(backbone: VllmBackbone) -> None:
    rng = np.random.default_rng(6)
    group = Group(ids(rng, 64), sampling=SamplingSpec(8, max_tokens=48, seed=1))
    for readouts, more in ((HEADS, 1), (WITH_EOS, 2)):
        samples, reading = asyncio.run(backbone.sample_and_read(group, readouts))
        assert reading.computed_tokens <= 64 + sum(len(sample.ids) + more for sample in samples) + 8 * 32


def test_greedy_samples_are_those_of_transformers(backbone: VllmBackbone, reference: TransformersBackbone) -> None:
    rng = np.random.default_rng(7)
    group = Group(ids(rng, 30), sampling=SamplingSpec(2, max_tokens=12, temperature=0))
    assert asyncio.run(backbone.sample(group)) == asyncio.run(reference.sample(group))


def test_a_seed_makes_samples_reproducible_and_samples_of_one_call_differ(backbone: VllmBackbone) -> None:
    def draw(seed: int | None) -> list[Any]:
        return asyncio.run(backbone.sample(Group((9, 8, 7), sampling=SamplingSpec(6, max_tokens=12, seed=seed))))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)
    assert len(set(first_alike([sample.ids for sample in draw(1)]))) > 1


def test_a_cancelled_call_is_aborted_in_the_engine_and_leaves_nothing_behind(backbone: VllmBackbone) -> None:
    async def run() -> None:
        group = Group(tuple(range(10, 40)), sampling=SamplingSpec(8, max_tokens=600))
        call = asyncio.create_task(backbone.sample_and_read(group, WITH_EOS))
        while not backbone._engine._alive.get_num_unfinished_requests():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        async with asyncio.timeout(PATIENCE):
            while backbone._engine._alive.get_num_unfinished_requests():
                await asyncio.sleep(0.01)
        await backbone.read([Group((5, 6), ((7,),))], HEADS)

    asyncio.run(run())
    assert held(backbone)[:2] == [0, 0]


@asynccontextmanager
async def serving(backbone: VllmBackbone) -> AsyncIterator[tuple[FakeServices, FakeHead]]:
    """HTTP around the engine, with one head."""
    head = FakeHead(layer=LAYERS, width=WIDTH)
    queue = MemoryQueue(max_tokens=100_000)
    working = asyncio.create_task(Worker(queue, Engine(backbone, FakeRegistry(head))).run())
    api = FakeServices(head.ref)
    api.services = replace(api.services, intake=Intake(queue), limits=Limits(timeout_s=PATIENCE))
    api.app = create_app(api.services)
    try:
        yield api, head
    finally:
        await queue.close()
        await working


async def test_answers_are_streamed_as_they_are_drawn_and_score_as_their_tokens_do_when_given(
    backbone: VllmBackbone,
) -> None:
    ask = {"prompt": "Which way?", "n": 6, "sampling": {"seed": 11, "max_tokens": 24}, "return_token_ids": True}
    async with serving(backbone) as (api, head):
        *samples, (last, result) = events((await api.post("/rerank", {**ask, "stream": True})).text)
        whole = (await api.post("/rerank", ask)).json()
    assert ([name for name, _ in samples], last) == (["sample"] * 6, "result")
    drawn = sorted((sample for _, sample in samples), key=lambda sample: sample["index"])
    again = sorted(whole["results"], key=lambda ranked: ranked["index"])
    assert [sample["token_ids"] for sample in drawn] == [ranked["token_ids"] for ranked in again]
    given = Group(tuple(map(ord, "Which way?\n\n")), tuple(tuple(sample["token_ids"]) for sample in drawn))
    scores = head.score((await backbone.read([given], [head.readout]))[0].readings[0]).scores_N
    for told in (drawn, again, sorted(result["results"], key=lambda ranked: ranked["index"])):
        assert [one["score"] for one in told] == pytest.approx(list(scores), rel=TOLERANCE, abs=TOLERANCE)


async def test_who_hangs_up_on_a_stream_has_the_engine_stop(backbone: VllmBackbone) -> None:
    async with serving(backbone) as (api, _):
        body = {"prompt": "Which way?", "n": 10, "sampling": {"max_tokens": 180}, "stream": True}
        await hang_up_after(api, body, wanted=1)
        await until(lambda: not backbone._engine._alive.get_num_unfinished_requests())
    await backbone.read([Group((5, 6), ((7,),))], HEADS)
    held_now = await backbone._engine.call(lambda: backbone._engine.rpc(HELD))
    assert held_now[:2] == [0, 0]


def test_many_versions_of_a_head_leave_the_table_as_wide_as_it_was(
    backbone: VllmBackbone, reference: TransformersBackbone
) -> None:
    group, rng, before = Group((5, 6), ((7,),)), np.random.default_rng(9), len(backbone._table.live())
    for _ in range(200):
        version = Readout((*HEADS[0].taps, Tap(1, "last", rng.normal(size=(WIDTH, 60)).astype(np.float32))))
        got = read(backbone, [group], [version])
    assert worst_error(got, read(reference, [group], [version])) <= TOLERANCE
    assert max(backbone._table.live()) < TABLE_COLUMNS
    assert len(backbone._table.live()) <= before + 2 * (3 + 60)  # this one and the last one
    assert held(backbone) == [0, 0, 0]


def test_a_readout_that_does_not_fit_is_refused_and_the_next_call_works(backbone: VllmBackbone) -> None:
    group = Group((5, 6), ((7,),))
    with pytest.raises(InvalidField, match="layer 5"):
        read(backbone, [group], one_a_tap([Tap(5, "last")]))
    assert len(read(backbone, [group], HEADS)) == 1


def test_heads_that_need_more_numbers_than_are_kept_are_read_all_the_same(
    backbone: VllmBackbone, reference: TransformersBackbone, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(10)
    many = Readout(tuple(Tap(2, "mean", rng.normal(size=(WIDTH, 90)).astype(np.float32)) for _ in range(3)))
    groups = [random_group(rng, 3)]
    assert worst_error(read(backbone, groups, [many]), read(reference, groups, [many])) <= TOLERANCE
    assert "without the prefix cache" in caplog.text


def test_a_model_that_passes_something_else_than_its_residual_stream_is_refused(
    backbone: VllmBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    rpc = backbone._engine.rpc

    async def another_norm(method: str, *args: Any) -> Any:
        return np.ones(WIDTH, np.float32).tobytes() if method == NORM else await rpc(method, *args)

    backbone._engine.wait(backbone._verify)
    monkeypatch.setattr(backbone._engine, "rpc", another_norm)
    with pytest.raises(SetupError, match="residual stream"):
        backbone._engine.wait(backbone._verify)


def test_a_text_that_is_too_long_is_refused_by_its_length(backbone: VllmBackbone) -> None:
    with pytest.raises(InvalidField, match="640"):
        read(backbone, [Group(tuple(range(5, 400)), (tuple(range(5, 400)),))], HEADS)


@pytest.mark.parametrize(
    "options",
    [{"pipeline_parallel_size": 2}, {"worker_cls": "x"}, {"no_such_option": 1}],
    ids=str,
)
def test_options_under_which_nothing_could_be_read_are_refused(options: dict[str, Any], folder: Path) -> None:
    with pytest.raises(SetupError, match=next(iter(options))):
        VllmBackbone(folder, name="tiny", options=options)


def test_vllms_own_options_reach_the_engine(backbone: VllmBackbone) -> None:
    config = backbone._engine.config
    assert config.scheduler_config.max_num_seqs == OPTIONS["max_num_seqs"]
    assert config.model_config.max_model_len == OPTIONS["max_model_len"]
    import vllm

    passed = {
        "tensor_parallel_size": 2,
        "quantization": "compressed-tensors",
        "gpu_memory_utilization": 0.5,
        "block_size": 64,
    }
    arguments = _arguments(Path("model"), "float32", passed)
    assert arguments.items() >= passed.items()
    assert vllm.AsyncEngineArgs(**arguments).tensor_parallel_size == 2


def test_a_killed_engine_answers_everybody_and_turns_health_red(backbone: VllmBackbone) -> None:
    async def run() -> list[Any]:
        groups = [Group(tuple(range(10, 40)), sampling=SamplingSpec(16, max_tokens=500, seed=i)) for i in range(8)]
        calls = [asyncio.create_task(backbone.sample_and_read(group, WITH_EOS)) for group in groups]
        calls.append(asyncio.create_task(backbone.read([Group((5,) * 600, ((6,),))], HEADS)))
        while not backbone._engine._alive.get_num_unfinished_requests():
            await asyncio.sleep(0.01)
        workers = [
            child
            for child in psutil.Process().children(recursive=True)
            if "VLLM" in child.name() or "vllm" in " ".join(child.cmdline())
        ]
        (workers or psutil.Process().children(recursive=True))[-1].kill()
        async with asyncio.timeout(PATIENCE):
            return await asyncio.gather(*calls, return_exceptions=True)

    answers = asyncio.run(run())
    assert any(isinstance(answer, EngineDead) for answer in answers)
    assert not [
        answer for answer in answers if isinstance(answer, BaseException) and not isinstance(answer, EngineDead)
    ]
    assert not backbone.healthy()
    with pytest.raises(EngineDead):
        read(backbone, [Group((5, 6), ((7,),))], HEADS)


OPEN = """
import sys, time
from pathlib import Path
from inward.backbones.vllm.backbone import VllmBackbone
OPTIONS = {"kv_cache_memory_bytes": 2**20, "max_model_len": 64, "enforce_eager": True}
if __name__ == "__main__":
    kept = VllmBackbone(Path(sys.argv[1]), name="tiny", dtype="float32", options=OPTIONS)  # let go of, it ends vLLM
    print("open", flush=True)
    time.sleep(3600)
"""


def test_when_the_process_that_owns_the_engine_is_killed_nothing_of_it_goes_on(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "open.py"
    script.write_text(OPEN)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, str(script), str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    ) as owner:
        assert owner.stdout is not None
        assert any(line.startswith("open") for line in owner.stdout)
        below = psutil.Process(owner.pid).children(recursive=True)
        names = " ".join(process.name() for process in below)
        owner.kill()
        _, left = psutil.wait_procs(below, timeout=PATIENCE)
    assert "EngineCore" in names and "Worker" in names
    assert not left
