"""Pairs that are read on a cluster: the same sums on any number of machines, and an actor that dies costs its block."""

import asyncio
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from copy import copy
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load

from inward.backbones.fake import FakeBackbone
from inward.errors import DataError, InvalidField, SetupError
from inward.offline.cluster import IN_HAND, TRIES, Cluster, Died
from inward.offline.data.pairs import Pair, prompt_groups
from inward.offline.fit.legend import fit_legend
from inward.offline.fit.ray import BLOCK_PAIRS, Pass, Reader, SpreadPairs, blocks_of
from inward.offline.states.moments import PairSums
from inward.offline.states.read import extract_pairs, sum_pairs
from support.letters import prompts
from support.waiting import PATIENCE, wait_until

PAIRS = [Pair(f"question {i // 3}", f"good {i}" + "!" * (i % 7), f"bad {i % 5}") for i in range(60)]
LAYERS = (0, 2, 4)
WHERE = {"layers": LAYERS, "final_norm": True, "progress": False}


@asynccontextmanager
async def opened():
    yield FakeBackbone(tokens=400), prompts()


def test_blocks_have_whole_prompts_and_every_pair_once():
    groups_N = prompt_groups(pair.prompt for pair in PAIRS[::2] + PAIRS[1::2])
    blocks = blocks_of(groups_N, 7, np.arange(0, 60, 4))
    assert sorted(np.concatenate([block.rows_N for block in blocks])) == list(range(60))
    assert sorted(np.concatenate([block.rows_N[block.kept_K] for block in blocks])) == list(range(0, 60, 4))
    prompts_of = [set(groups_N[block.rows_N]) for block in blocks]
    assert sum(map(len, prompts_of)) == len(set(groups_N)) and len(blocks) > 5
    assert len(blocks_of(groups_N, BLOCK_PAIRS)) == 1


def test_sums_of_blocks_are_those_of_one_pass():
    blocks = blocks_of(prompt_groups(pair.prompt for pair in PAIRS), 9)
    reader = Reader(opened, Pass(LAYERS, "last", scatter=True), PAIRS, blocks)
    total = [PairSums.empty(16) for _ in LAYERS]
    for number in range(len(blocks)):
        tensors = load(reader.do(number))
        for axis, sums in enumerate(total):
            sums.merge(PairSums.from_tensors(tensors, f"{axis}."))
    reader._loop.close()
    whole = asyncio.run(
        sum_pairs(FakeBackbone(tokens=400), prompts(), PAIRS, layers=LAYERS, final_norm=True, progress=False)
    )
    for sums, wanted in zip(total, whole.sums_L, strict=True):
        assert (sums.pairs, sums.moments.count) == (wanted.pairs, wanted.moments.count)
        np.testing.assert_allclose(sums.difference_D, wanted.difference_D, rtol=1e-9)
        np.testing.assert_allclose(sums.moments.mean_D, wanted.moments.mean_D, rtol=1e-9)
        # a block's products are float32: another block size is another rounding
        np.testing.assert_allclose(sums.moments.scatter_DD, wanted.moments.scatter_DD, rtol=1e-4, atol=1e-4)


def test_a_bad_row_is_told_by_its_number_among_all_pairs():
    pairs = [*PAIRS[::2], Pair("question 1", "good", ""), *PAIRS[1::2]]
    blocks = blocks_of(prompt_groups(pair.prompt for pair in pairs), 9)
    (number,) = (n for n, block in enumerate(blocks) if 30 in block.rows_N)
    reader = Reader(opened_strict, Pass(LAYERS, "last", scatter=True), pairs, blocks)
    with pytest.raises(DataError, match=r"^row 31: ") as raised:
        reader.do(number)
    reader._loop.close()
    with pytest.raises(DataError) as locally:
        asyncio.run(sum_pairs(FakeBackbone(tokens=400), strict(prompts()), pairs, **WHERE))
    assert raised.value.message == locally.value.message == copy(locally.value).message  # as pickle does


def strict(prompts):
    """Prompts that refuse an empty response, as a chat template may."""
    group = prompts.group

    def grouped(prompt, texts, **more):
        if "" in texts:
            raise InvalidField("is empty", param="rejected")
        return group(prompt, texts, **more)

    prompts.group = grouped
    return prompts


@asynccontextmanager
async def opened_strict():
    yield FakeBackbone(tokens=400), strict(prompts())


class Here(Cluster):
    """No Ray: whatever is asked is answered in this process, in order, and noted."""

    def __init__(self):
        self.done, self.stop_after = [], None

    def ask(self, question, *arguments):
        return question(*arguments)

    def each(self, worker, arguments, numbers, *, ordered=False):
        reader = worker(*arguments)
        try:
            for number in numbers:
                if len(self.done) == self.stop_after:
                    raise KeyboardInterrupt
                self.done.append(number)
                yield number, reader.do(number)
        finally:
            reader._loop.close()


def test_sums_that_were_stopped_go_on_and_are_one_file(tmp_path):
    whole = asyncio.run(sum_pairs(FakeBackbone(tokens=400), prompts(), PAIRS, **WHERE))
    cluster = Here()
    spread = SpreadPairs(cluster, opened, PAIRS, tmp_path, block=9)
    cluster.stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        spread.sums(LAYERS, "last")
    assert len(list(tmp_path.rglob("*.*"))) == 1
    cluster.stop_after = None
    sums = spread.sums(LAYERS, "last")
    assert cluster.done == list(range(7))
    assert len(list(tmp_path.rglob("*.*"))) == 1
    for one, wanted in zip(sums.sums_L, whole.sums_L, strict=True):
        assert one.pairs == wanted.pairs
        np.testing.assert_allclose(one.difference_D, wanted.difference_D, rtol=1e-9)
    np.testing.assert_allclose(sums.kept.chosen_NLD, whole.kept.chosen_NLD, rtol=1e-6)
    np.testing.assert_allclose(sums.kept.rejected_NLD, whole.kept.rejected_NLD, rtol=1e-6)
    np.testing.assert_array_equal(sums.kept.length_difference_N, whole.kept.length_difference_N)
    np.testing.assert_array_equal(sums.kept.groups_N, whole.kept.groups_N)


def test_the_states_of_some_pairs_are_kept_in_the_order_of_the_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr("inward.offline.fit.ray.kept_pairs", lambda *_: np.array([50, 3, 4, 21]))
    shuffled = PAIRS[::2] + PAIRS[1::2]
    kept = SpreadPairs(Here(), opened, shuffled, tmp_path, block=9).sums(LAYERS, "last", scatter=False).kept
    every = asyncio.run(extract_pairs(FakeBackbone(tokens=400), prompts(), shuffled, **WHERE))
    np.testing.assert_allclose(kept.chosen_NLD, every.chosen_NLD[[3, 4, 21, 50]], rtol=1e-6)
    np.testing.assert_array_equal(kept.length_difference_N, every.length_difference_N[[3, 4, 21, 50]])


def test_a_mean_direction_of_blocks_is_that_of_one_pass_and_takes_no_scatter(tmp_path, monkeypatch):
    states = asyncio.run(extract_pairs(FakeBackbone(tokens=400), prompts(), PAIRS, **WHERE))
    spread = SpreadPairs(Here(), opened, PAIRS, tmp_path, block=9)
    everything = spread.sums(LAYERS, "last", scatter=False)
    monkeypatch.setattr("inward.offline.fit.ray.kept_pairs", lambda *_: np.arange(15, 45))
    (tmp_path / next(tmp_path.iterdir())).unlink()
    some = spread.sums(LAYERS, "last", scatter=False)
    sides = states.chosen_NLD, states.rejected_NLD
    for axis in range(len(LAYERS)):
        wanted_D = np.subtract(*(side[:, axis].mean(axis=0, dtype=np.float64) for side in sides))
        for found in (everything, some):
            np.testing.assert_allclose(found.sums(axis).mean_difference_D, wanted_D, rtol=1e-9)
            assert found.sums(axis).moments.scatter_DD is None
    assert len(some.kept) == 30 and len(some.groups_N) == len(everything.kept) == 60
    head, report = fit_legend(states, layer="sweep")
    found_head, found = fit_legend(everything, layer="sweep")
    np.testing.assert_array_equal(found_head.direction, head.direction)
    assert replace(found, stability=0.0) == replace(report, stability=0.0)
    assert found.stability == pytest.approx(report.stability, abs=1e-9)
    some_head, judged = fit_legend(some, layer=found.layer)
    np.testing.assert_allclose(some_head.direction, head.direction, rtol=1e-6, atol=1e-7)
    assert (judged.rows, judged.prompts) == (60, 20) and judged.held_out_rows < 10


@pytest.mark.parametrize("wrong", ["row", "model"])
def test_what_is_wrong_is_told_before_anything_is_read(tmp_path, wrong):
    @asynccontextmanager
    async def missing():
        raise SetupError("there is no such model")
        yield

    pairs = [*PAIRS[:40], Pair("question 1", "good", ""), *PAIRS[40:]]
    cluster = Here()
    with pytest.raises(SetupError, match="^row 41: rejected: is empty" if wrong == "row" else "no such model"):
        SpreadPairs(cluster, opened_strict if wrong == "row" else missing, pairs, tmp_path, block=9)
    assert not cluster.done


def fake_model(log=None, dies=None):
    """Opens a fake model; it writes down what it reads, and the first process that reads ``dies`` ends. By value: Ray's
    processes do not have this file as a module."""

    def note(text):
        import os
        from pathlib import Path

        died = Path(f"{log}.died")
        if dies is not None and text.startswith(dies) and not died.exists():
            died.touch()
            os._exit(1)
        if log is not None:
            with Path(log).open("a") as file:
                file.write(f"{os.getpid()} {text}\n")

    @asynccontextmanager
    async def opened():
        from inward.backbones.fake import FakeBackbone
        from support.letters import prompts

        class Noting(FakeBackbone):
            async def read(self, groups, readouts, **more):
                for group in groups:
                    note("".join(chr(i - 1) for i in group.prompt_ids))
                return await super().read(groups, readouts, **more)

        yield Noting(tokens=400), prompts()

    return opened


def made(tmp_path, actors, model, block=9):
    if "RAY_ADDRESS" not in os.environ:
        import ray

        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")  # whatever is here
    with Cluster(actors=actors, gpus=0) as cluster:
        spread = SpreadPairs(cluster, model, PAIRS, tmp_path, block=block)
        return spread.sums(LAYERS, "last"), spread.sums(LAYERS, "last", scatter=False)


def same(a, b):
    for one, other in zip(a.sums_L, b.sums_L, strict=True):
        np.testing.assert_allclose(one.difference_D, other.difference_D, rtol=1e-9)
        np.testing.assert_allclose(one.moments.mean_D, other.moments.mean_D, rtol=1e-9)
        np.testing.assert_allclose(one.moments.scatter_DD, other.moments.scatter_DD, rtol=1e-9)
    np.testing.assert_array_equal(a.kept.chosen_NLD, b.kept.chosen_NLD)


def test_two_actors_one_of_which_is_killed_give_the_sums_of_one(tmp_path, ray_processes):
    one, means_of_one = made(tmp_path / "one", 1, fake_model())
    log = tmp_path / "log"
    two, means_of_two = made(tmp_path / "two", 2, fake_model(str(log), dies="question 11:"))
    assert (tmp_path / "log.died").exists()
    same(one, two)
    for a, b in zip(means_of_one.sums_L, means_of_two.sums_L, strict=True):
        np.testing.assert_array_equal(a.difference_D, b.difference_D)
    np.testing.assert_array_equal(two.kept.length_difference_N, means_of_two.kept.length_difference_N)
    read = Counter(line.split(" ", 1)[1] for line in log.read_text().splitlines())
    again = {text for text, n in read.items() if n > 2}  # twice are the two passes
    assert len(again) < IN_HAND * 3, "more was read again than the blocks, of three prompts, that it had in hand"
    before = log.stat().st_size
    same(made(tmp_path / "two", 1, fake_model(str(log)))[0], one)
    assert log.stat().st_size == before, "blocks that are kept are not read again"


def worker(folder):
    """Whose first part waits until nothing more is begun, and whose fourth is wrong if ``folder`` has a file."""

    class Waiting:
        def do(self, number):
            import time
            from pathlib import Path

            from inward.errors import DataError

            begun = Path(folder)
            (begun / str(number)).touch()
            while number == 0 and not (begun / "go on").exists():
                time.sleep(0.05)
            if number == 3 and (begun / "wrong").exists():
                raise DataError("row 7: is wrong", param="chosen")
            return b"%d" % number

    return Waiting


def test_results_come_in_order_a_few_of_them_wait_and_an_error_is_itself(tmp_path, ray_processes):
    import ray

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    with Cluster(actors=2, gpus=0) as cluster:
        begun = tmp_path
        results = cluster.each(worker(str(begun)), (), list(range(30)), ordered=True)
        with ThreadPoolExecutor(1) as pool:
            everything = pool.submit(list, results)
            wait_until(lambda: len(list(begun.iterdir())) >= 5)  # two in hand with the first, four more wait for it
            settled = len(list(begun.iterdir()))
            (begun / "go on").touch()
            assert everything.result(PATIENCE) == [(n, b"%d" % n) for n in range(30)]
        assert settled == 5
        (begun / "wrong").touch()
        for ordered in (True, False):
            with pytest.raises(DataError, match=r"^row 7: is wrong$") as raised:
                list(cluster.each(worker(str(begun)), (), [4, 5, 3, 6], ordered=ordered))
            assert raised.value.param == "chosen"


def deadly(log, part=None):
    """Whose process ends at ``part``, or before it is given any."""

    class Deadly:
        def __init__(self):
            import os

            if part is None:
                os._exit(1)

        def do(self, number):
            import os
            from pathlib import Path

            with Path(log).open("a") as file:
                file.write(f"{number}\n")
            if number == part:
                os._exit(1)
            return b"%d" % number

    return Deadly


@pytest.mark.parametrize("ordered", [True, False])
def test_a_part_that_every_actor_dies_of_is_tried_a_few_times_and_the_others_are_done(tmp_path, some_actors, ordered):
    log = tmp_path / "log"
    with Cluster(actors=2, gpus=0) as cluster:
        found = list(cluster.each(deadly(str(log), 4), (), list(range(9)), ordered=ordered))
    wanted = [(n, b"%d" % n if n != 4 else Died(TRIES)) for n in range(9)]
    assert (found if ordered else sorted(found, key=lambda one: one[0])) == wanted
    tried = Counter(map(int, log.read_text().split()))
    assert tried.pop(4) in (TRIES, TRIES + 1)  # once perhaps with another part in hand
    assert set(tried) == set(range(9)) - {4} and tried.total() <= 9  # that one was done, and could not say so


def test_actors_that_die_whatever_they_are_given_end_the_command(tmp_path, some_actors, monkeypatch):
    monkeypatch.setattr("inward.offline.cluster.DEATHS", 2)
    with Cluster(actors=1, gpus=0) as cluster, pytest.raises(SetupError, match="2 processes died one after the other"):
        list(cluster.each(deadly(""), (), [1, 2, 3]))


def test_a_model_that_takes_its_process_down_is_told(some_actors):
    def ask():
        os._exit(1)

    with Cluster(actors=1, gpus=0) as cluster, pytest.raises(SetupError, match="the process that loads the model dies"):
        cluster.ask(ask)


def test_rows_that_every_actor_dies_of_are_named(tmp_path, monkeypatch):
    pairs = [*PAIRS[::2], Pair("question 5", "long " * 99, "bad"), *PAIRS[1::2]]
    monkeypatch.setattr(Here, "each", lambda *_, **__: iter([(1, Died(3))]))
    spread = SpreadPairs(Here(), opened, pairs, tmp_path, block=9)
    rows = r"the pairs of rows 6 to 9, 31, 36 to 40 died.* row 31, with 508 characters"
    with pytest.raises(SetupError, match=rows):
        spread.sums(LAYERS, "last")


def test_on_two_nodes(tmp_path, ray_processes, monkeypatch):
    import ray
    from ray.cluster_utils import Cluster

    one, _ = made(tmp_path / "one", 1, fake_model())
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        nodes.add_node(num_cpus=1)
        nodes.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", nodes.address)
        two, _ = made(tmp_path / "two", 2, fake_model())
        same(one, two)
    finally:
        ray.shutdown()
        nodes.shutdown()
