"""The circle with a stand-in for the service: what happens when, and that a run which is killed goes on exactly."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file

from inward_trainer import cdpo, feed, loop
from inward_trainer.errors import DataError, DivergedError, OptionsError
from inward_trainer.journal import Journal
from inward_trainer.logs import read_log
from inward_trainer.loop import HeadUpdates
from inward_trainer.losses import cdpo_loss
from inward_trainer.policy import Publisher
from support.fake_inward import FakeInward, served
from support.small_policy import options, rows, write_policy, write_rows

STEPS, EVERY, BATCH = 6, 2, 2


class Killed(BaseException):
    """What no handler in between catches, as nothing survives a ``kill -9``."""


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return write_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def world(tmp_path, policy):
    """A stand-in and the options of a run around it."""
    fake = FakeInward(adapters=tmp_path / "adapters")
    with served(fake) as url:
        prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows(20)])
        yield fake, options(
            model=str(policy), url=url, out=tmp_path / "run", source="samples", prompts=prompts, samples=4, steps=STEPS,
            adapters=tmp_path / "adapters", publish_every=EVERY, update_head=True, monitor="monitor", held_out=prompts, held_out_prompts=3,
        )  # fmt: skip


def steps_of(run):
    return [line for line in read_log(run.out / "log.jsonl") if "loss" in line]


def weights(run):
    return load_file(run.out / "final/adapter_model.safetensors")


def test_every_step_learns_publishes_and_updates_the_head(world):
    fake, run = world
    assert cdpo.run(run) == 0
    lines = steps_of(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert sorted(id for line in lines for id in line["pairs"]) == sorted(str(i) for i in range(STEPS * BATCH)), (
        "each prompt once"
    )
    assert [len(pairs) for pairs in fake.updates.values()] == [BATCH] * STEPS
    assert [version.rpartition("-")[2] for version in fake.policies] == ["base", "000002", "000004", "000006"]
    assert {path.name for path in (run.adapters).iterdir()} == set(fake.policies) - {"base"}
    published = load_file(run.adapters / fake.policy / "adapter_model.safetensors")
    assert all(torch.equal(published[name], value) for name, value in weights(run).items())
    looks = [line for line in read_log(run.out / "log.jsonl") if "policy_version" in line]
    assert [look["step"] for look in looks] == [0, 2, 4, 6]
    assert {"held_out/reward", "held_out/monitor", "hybrid/accuracy_after", "monitor/accuracy_after"} <= looks[
        -1
    ].keys()
    assert lines[0]["gamma"] == pytest.approx(0.9)
    assert {"rewards/accuracies", "hybrid/accuracy", "monitor/accuracy", "kl", "hybrid/reward/mean", "loss"} <= lines[
        -1
    ].keys()


def test_a_run_that_diverges_ends_before_it_spoils_the_policy_and_goes_on_when_that_is_mended(world, monkeypatch):
    fake, run = world
    with monkeypatch.context() as patched:
        calls = []

        def diverging(z, confidence):
            calls.append(z)
            return cdpo_loss(z, confidence) * (math.nan if len(calls) == EVERY + 1 else 1.0)

        patched.setattr("inward_trainer.trainer.cdpo_loss", diverging)
        with pytest.raises(DivergedError, match=f"step {EVERY + 1} .* lower --learning-rate"):
            cdpo.run(run)
    assert [version.rpartition("-")[2] for version in fake.policies] == ["base", "000002"]
    published = load_file(run.adapters / fake.policy / "adapter_model.safetensors")
    assert all(torch.isfinite(value).all() for value in published.values())
    assert cdpo.run(run.model_copy(update={"learning_rate": 1e-4})) == 0
    assert [line["step"] for line in steps_of(run)] == list(range(1, STEPS + 1))


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(world, tmp_path, monkeypatch):
    fake, run = world
    assert cdpo.run(run) == 0
    again = FakeInward(adapters=tmp_path / "adapters-again")
    with served(again) as url:
        killed = run.model_copy(update={"url": url, "out": tmp_path / "killed", "adapters": again.adapters})
        deaths = [
            (Journal, "write", 2, "after"),  # pairs written down, never used
            (HeadUpdates, "__call__", 2, "after"),  # the head updated, the step in no checkpoint
            (loop, "mark_complete", 1, "before"),  # a checkpoint half written
            (Publisher, "publish", 1, "before"),  # at the start of the next process, too
            (Publisher, "enforce", 3, "before"),  # a version copied, and not loaded
            (loop, "look", 2, "after"),  # told everybody, and the journal not cleared
            (Journal, "write", 1, "before"),  # pairs drawn, not written down
            (HeadUpdates, "__call__", 1, "before"),
        ]
        for owner, name, count, when in deaths:
            with monkeypatch.context() as patch:
                dies(patch, owner, name, count, when)
                with pytest.raises(Killed):
                    cdpo.run(killed)
        assert cdpo.run(killed) == 0
    assert [line["pairs"] for line in steps_of(killed)] == [line["pairs"] for line in steps_of(run)], (
        "no pair lost, none twice"
    )
    assert again.updates == fake.updates, "each update once"
    assert [v.rpartition("-")[2] for v in again.policies] == [v.rpartition("-")[2] for v in fake.policies]
    assert all(torch.equal(weights(killed)[name], value) for name, value in weights(run).items())


def dies(patch, owner, name, count, when):
    """The ``count``-th call of a function is the last thing that happens, or does not happen any more."""
    original, calls = getattr(owner, name), []

    def mortal(*args, **kwargs):
        calls.append(1)
        if len(calls) == count and when == "before":
            raise Killed
        result = original(*args, **kwargs)
        if len(calls) == count:
            raise Killed
        return result

    patch.setattr(owner, name, mortal)


def test_a_service_that_forgot_the_policy_is_told_again(world, monkeypatch):
    fake, run = world
    original = Journal.write

    def restarted(journal, step):
        if step.number == 4:
            fake.policies.append("base")
        original(journal, step)

    monkeypatch.setattr(Journal, "write", restarted)
    cdpo.run(run)
    assert [v.rpartition("-")[2] for v in fake.policies] == ["base", "000002", "base", "000004", "000006"]


def test_pairs_of_a_policy_that_is_too_old_are_refused(world, monkeypatch):
    _, run = world
    monkeypatch.setattr(Publisher, "enforce", lambda *_: None)  # so that the service stays with base for ever
    monkeypatch.setattr(feed, "MOST_IN_VAIN", 5)
    with pytest.raises(DataError, match="none of the last 6 portions"):
        cdpo.run(run)
    assert len(steps_of(run)) == 2 * EVERY, "base is one version behind until the second one is published"


def test_another_trainer_in_the_folder_is_refused(world):
    _, run = world
    with cdpo.locked(run), pytest.raises(OptionsError, match="another trainer works"):
        cdpo.run(run)


def test_going_on_with_steps_of_another_size_is_refused(world):
    _, run = world
    cdpo.begin(run, 2, None)
    with pytest.raises(OptionsError, match="2 pairs a step"):
        cdpo.begin(run, 4, None)


def test_head_updates_can_not_begin_in_the_middle_of_a_run(world):
    _, run = world
    cdpo.begin(run.model_copy(update={"update_head": False}), BATCH, None)
    with pytest.raises(OptionsError, match="without --update-head"):
        cdpo.run(run)


def test_a_version_is_called_as_the_service_takes_it(world, tmp_path):
    _, run = world
    name = cdpo.begin(run.model_copy(update={"out": tmp_path / ".über run"}), BATCH, None).name
    assert re.fullmatch(r"ber-run-[0-9a-f]{8}", name)


def test_a_stopped_run_saves_and_goes_on(world):
    _, run = world
    run = run.model_copy(update={"adapters": None, "held_out": None, "checkpoint_every": 100})
    original = loop.Circle.on_step_end

    def stop(self, args, state, control, **more):
        if state.global_step == 3:
            self.stop()
        original(self, args, state, control, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Circle, "on_step_end", stop)
        cdpo.run(run)
    assert [line["step"] for line in steps_of(run)] == [1, 2, 3]
    cdpo.run(run)
    assert [line["step"] for line in steps_of(run)] == list(range(1, STEPS + 1))
    assert len({id for line in steps_of(run) for id in line["pairs"]}) == STEPS * BATCH


def test_a_source_that_ends_early_still_leaves_a_checkpoint_and_a_result(world):
    fake, run = world
    original = fake.answer

    def mostly_the_same(method, path, body):
        status, content = original(method, path, body)
        if path == "/rerank" and int(body["prompt"].partition(":")[0]) > 4:
            content = content | {"results": content["results"][:1]}
        return status, content

    fake.answer = mostly_the_same
    cdpo.run(run.model_copy(update={"steps": None}))
    assert len(steps_of(run)) == 2, "five prompts of twenty give pairs, two a step"
    assert (run.out / "checkpoints/checkpoint-2/complete").is_file()
    assert weights(run)


def test_all_weights_can_be_trained_and_the_run_goes_on(policy, tmp_path, monkeypatch):
    pairs = write_rows(tmp_path / "pairs.jsonl", [row | {"confidence": 1.0} for row in rows(4)])
    run = options(
        model=str(policy),
        out=tmp_path / "run",
        pairs=pairs,
        epochs=4,
        full=True,
        checkpoint_every=2,
        learning_rate=1e-3,
        beta=0.5,
    )
    with monkeypatch.context() as patch:
        dies(patch, Journal, "write", 6, "after")
        with pytest.raises(Killed):
            cdpo.run(run)
    cdpo.run(run)
    lines = steps_of(run)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-3) and lines[-1]["loss"] < 0.6
    assert (run.out / "final/model.safetensors").is_file()


def test_a_file_of_pairs_for_several_epochs_is_learnt(policy, tmp_path):
    pairs = write_rows(tmp_path / "pairs.jsonl", [row | {"confidence": 1.0} for row in rows(5)])
    run = options(
        model=str(policy), out=tmp_path / "run", pairs=pairs, epochs=8, accumulate=2, checkpoint_every=5, beta=0.5
    )
    cdpo.run(run)
    lines = steps_of(run)
    used = [id for line in lines for id in line["pairs"]]
    assert len(lines) == 10
    assert all(sorted(used[i : i + 5]) == ["0", "1", "2", "3", "4"] for i in range(0, 40, 5)), (
        "each pair once in every epoch"
    )
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.2
    assert lines[-1]["rewards/accuracies"] == 1.0
    assert json.loads((run.out / "run.json").read_text())["rows"] == 4
