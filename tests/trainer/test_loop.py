"""The online loop with a stand-in for the service: what happens when, and that a run that is killed goes on exactly."""

import json
import math
import re
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from pydantic import SecretStr
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from inward_trainer import cdpo, loop
from inward_trainer.errors import DataError, DivergedError, OptionsError, ServiceError
from inward_trainer.fingerprint import fingerprint
from inward_trainer.journal import Journal, Step
from inward_trainer.logs import read_log
from inward_trainer.loop import HeadUpdates
from inward_trainer.losses import cdpo_loss
from inward_trainer.policy import Publisher
from inward_trainer.runs import locked, new_run
from support.fake_inward import FakeInward, served
from support.small_policy import ends_after, options, rows, write_policy, write_rows

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
            adapters=tmp_path / "adapters", publish_every=EVERY, update_head=True, monitor="monitor", held_out=prompts,
            held_out_prompts=3,
        )  # fmt: skip


def steps_of(run):
    return [line for line in read_log(run.out / "log.jsonl") if "loss" in line]


def weights(run):
    return load_file(run.out / "final/adapter_model.safetensors")


def test_the_service_sleeps_while_a_step_is_computed_and_is_left_awake(world):
    fake, run = world
    fake.asleep = True  # a former run was killed in the middle of a step
    asleep = []
    begin = cdpo.FedTrainer.training_step

    def step(*args, **kwargs):
        asleep.append(fake.asleep)
        return begin(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cdpo.FedTrainer, "training_step", step)
        assert cdpo.run(run.model_copy(update={"lend_device": True})) == 0
    assert asleep == [True] * STEPS and not fake.asleep
    asked = [path for path, _ in fake.asked if path in ("/sleep", "/wake")]
    assert asked == ["/wake", *["/sleep", "/wake"] * STEPS, "/wake"]


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
    assert {
        "rewards/accuracies",
        "hybrid/accuracy",
        "monitor/accuracy",
        "log_ratio",
        "hybrid/reward/mean",
        "loss",
    } <= lines[-1].keys()


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
    versions = [version.rpartition("-")[2] for version in fake.policies]
    assert versions == ["base", "000002", "base", "000002", "000004", "000006"], "also for the head's update"


def test_the_last_policy_is_published_whatever_the_steps_are(world):
    fake, run = world
    assert cdpo.run(run.model_copy(update={"steps": 3})) == 0
    assert [version.rpartition("-")[2] for version in fake.policies] == ["base", "000002", "000003"]
    published = load_file(run.adapters / fake.policy / "adapter_model.safetensors")
    assert all(torch.equal(published[name], value) for name, value in weights(run).items())
    looks = [line for line in read_log(run.out / "log.jsonl") if "policy_version" in line]
    assert [look["step"] for look in looks] == [0, 2, 3]
    assert looks[-1]["held_out/answers"] == 3 and looks[-1]["held_out/reward_se"] > 0
    cdpo.run(run)
    assert [version.rpartition("-")[2] for version in fake.policies][3:] == ["000004", "000006"], "and it goes on"


def test_trackers_are_told_of_steps_and_of_what_is_measured_between_them(world, monkeypatch):
    """Any that Hugging Face's trainer knows; TensorBoard stands for them."""
    _, run = world
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(run.out / "tracked"))
    assert cdpo.run(run.model_copy(update={"steps": 2, "report_to": ["tensorboard"]})) == 0
    found = EventAccumulator(str(run.out / "tracked")).Reload()
    assert [event.step for event in found.Scalars("train/loss")] == [1, 2]
    assert [event.step for event in found.Scalars("train/held_out/reward")] == [0, 2]
    assert len(steps_of(run)) == 2


def test_old_versions_and_checkpoints_are_removed(world):
    _, run = world
    cdpo.run(run.model_copy(update={"publish_every": 1, "keep_adapters": 3, "steps": 5}))
    assert sorted(path.name[-6:] for path in run.adapters.iterdir()) == ["000003", "000004", "000005"]
    assert len(list((run.out / "checkpoints").glob("checkpoint-*"))) == 2


def test_answers_of_another_policy_than_the_one_asked_for_are_never_used(world, monkeypatch):
    """A service that is restarted, in the middle of anything, answers with its base until it is told again."""
    fake, run = world
    original, count = fake.answer, 0

    def forgetful(method, path, body):
        nonlocal count
        count += 1
        if count % 7 == 0 and fake.policy != "base":
            fake.policies.append("base")
        return original(method, path, body)

    fake.answer = forgetful
    seen = []
    steps = loop.OnlineLoop.on_step_end

    def look(self, args, state, control, **more):
        done = state.global_step - 1
        seen.append([pair.policy_version.rpartition("-")[2] for pair in self._feed.current.pairs])
        assert set(seen[-1]) == {f"{done - done % EVERY:06d}" if done >= EVERY else "base"}
        steps(self, args, state, control, **more)

    monkeypatch.setattr(loop.OnlineLoop, "on_step_end", look)
    assert cdpo.run(run) == 0
    assert len(seen) == STEPS
    assert fake.policies.count("base") > 3


def test_a_service_that_somebody_else_switches_ends_the_run(world):
    fake, run = world
    original = fake.answer

    def fought_over(method, path, body):
        status, content = original(method, path, body)
        if path == "/rerank":
            content = content | {"policy_version": "theirs-000001"}
        return status, content

    fake.answer = fought_over
    with pytest.raises(ServiceError, match="who else switches it"):
        cdpo.run(run)


def test_another_model_than_the_services_is_refused_before_anything_is_drawn(world, tmp_path):
    fake, run = world
    right = fingerprint(Path(run.model))
    fake.about = {"fingerprint": right, "template": "chat:0000000000000000"}
    with pytest.raises(OptionsError, match="--template: the service renders prompts by 'chat:0000"):
        cdpo.run(run)
    other = write_policy(tmp_path / "same-shapes", seed=6)
    fake.about = {"fingerprint": fingerprint(other), "model": "other"}
    with pytest.raises(OptionsError, match=r"not what the service serves, other .*--model service"):
        cdpo.run(run)
    assert not fake.drawn
    fake.about = {"fingerprint": right, "path": run.model}
    assert cdpo.run(run.model_copy(update={"model": "service", "steps": 1})) == 0


def judged(run):
    return [line for line in read_log(run.out / "log.jsonl") if "eval/loss" in line]


def test_every_checkpoint_is_judged_on_pairs_that_nobody_trains_on_and_the_best_is_kept(world, tmp_path):
    _, run = world
    pairs = write_rows(tmp_path / "eval.jsonl", [row | {"confidence": 0.9} for row in rows(5)])
    run = run.model_copy(update={"eval_pairs": pairs})
    assert cdpo.run(run) == 0
    lines = judged(run)
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    assert lines[0]["eval/loss"] == pytest.approx(math.log(2)) and lines[0]["eval/margin"] == 0.0
    assert len({line["eval/loss"] for line in lines}) == 4
    assert all(line["eval/loss_se"] > 0 for line in lines[1:])
    looks = [line for line in read_log(run.out / "log.jsonl") if "policy_version" in line]
    names = {f"eval/{judge}_{what}" for judge in ("hybrid", "monitor") for what in ("reward", "margin", "accuracy")}
    assert all(names | {f"{name}_se" for name in names} <= look.keys() for look in looks)
    best = min(lines[1:], key=lambda line: line["eval/loss"])
    assert json.loads((run.out / "best/evaluation.json").read_text()) == best
    kept = load_file(run.out / "best/adapter_model.safetensors")
    published = load_file(next(run.adapters.glob(f"*-{best['step']:06d}")) / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in published.items())


def test_a_run_that_only_gets_worse_ends_early_publishes_and_stays_ended(world, tmp_path, monkeypatch):
    fake, run = world
    pairs = write_rows(tmp_path / "eval.jsonl", [row | {"confidence": 0.9} for row in rows(3)])
    losses = iter([0.7, 0.5, 0.6, 0.55, 0.4, 0.3])
    monkeypatch.setattr(loop.FedTrainer, "pair_losses", lambda self, rows, seen=losses: [(next(seen), 1.0)] * len(rows))
    run = run.model_copy(
        update={"eval_pairs": pairs, "stop_after": 2, "publish_every": 1, "steps": 6, "held_out": None}
    )
    assert cdpo.run(run) == 0
    assert [line["step"] for line in judged(run)] == [0, 1, 2, 3]
    assert json.loads((run.out / "best/evaluation.json").read_text())["step"] == 1
    assert [version.rpartition("-")[2] for version in fake.policies] == ["base", "000001", "000002", "000003"]
    assert cdpo.run(run) == 0
    assert [line["step"] for line in steps_of(run)] == [1, 2, 3]


def test_a_head_is_found_by_its_kind_whatever_it_is_called(world):
    fake, run = world
    fake.heads = ({"name": "danger", "kind": "legend"}, {"name": "kindness", "kind": "hybrid"})
    assert cdpo.run(run.model_copy(update={"monitor": "danger", "steps": 2})) == 0
    assert {body["head"] for path, body in fake.asked if path == "/rerank"} == {"kindness"}
    assert "/heads/kindness/update" in {path for path, _ in fake.asked}
    with pytest.raises(OptionsError, match=r"no head 'kindest' of kind hybrid; it has: danger \(legend\), kindness"):
        cdpo.run(run.model_copy(update={"head": "kindest", "monitor": "danger"}))


def test_a_head_that_pools_is_refused_for_online_updates_before_anything_is_drawn(world):
    fake, run = world
    pool = {"name": "max_ema", "alpha": 0.5, "window": 10, "k": 10, "layer": None}
    fake.heads = tuple(head | {"pool": pool} for head in fake.heads)
    with pytest.raises(OptionsError, match="--update-head: head 'hybrid' pools the scores of its tokens"):
        cdpo.run(run)
    assert "/rerank" not in {path for path, _ in fake.asked} and not fake.updates
    assert cdpo.run(run.model_copy(update={"update_head": False, "steps": 1})) == 0


def test_a_held_out_prompt_that_is_too_long_does_not_end_a_run(world, caplog):
    fake, run = world
    original = fake.answer

    def refusing(method, path, body):
        if path == "/rerank" and body["n"] == 1 and body["prompt"].startswith("1:"):
            return 413, {"error": {"message": "too long", "param": "prompt"}}
        return original(method, path, body)

    fake.answer = refusing
    assert cdpo.run(run.model_copy(update={"steps": 2})) == 0
    looks = [line for line in read_log(run.out / "log.jsonl") if "held_out/answers" in line]
    assert [look["held_out/answers"] for look in looks] == [2, 2]
    assert "prompt 1 is left out: 413: too long" in caplog.text


def test_another_trainer_in_the_folder_is_refused(world):
    _, run = world
    with locked(run.out), pytest.raises(OptionsError, match="another trainer works"):
        cdpo.run(run)


def test_a_run_that_goes_on_says_which_options_differ_and_refuses_what_can_not(world, capsys):
    _, run = world
    run = run.model_copy(update={"steps": 2, "adapters": None, "held_out": None, "checkpoint_every": 1})
    cdpo.run(run)
    before = steps_of(run)
    with pytest.raises(OptionsError, match="--lora-rank 4 → 8; --lora-targets all-linear → q_proj"):
        cdpo.run(run.model_copy(update={"lora_rank": 8, "lora_targets": "q_proj"}))
    with pytest.raises(OptionsError, match="2 → 6 pairs a step"):
        cdpo.run(run.model_copy(update={"accumulate": 3}))
    with pytest.raises(OptionsError, match="another model"):
        cdpo.run(run.model_copy(update={"model": str(write_policy(run.out.parent / "another", seed=9))}))
    assert cdpo.run(run.model_copy(update={"steps": 3, "learning_rate": 1e-4})) == 0
    assert "goes on with other options than it began with: --learning-rate 0.01 → 0.0001" in capsys.readouterr().err
    assert steps_of(run)[:2] == before


def test_a_run_that_failed_before_it_took_anything_begins_anew_with_other_options(world, tmp_path, capsys):
    fake, run = world
    original = fake.answer

    def refusing(method, path, body):
        if path == "/rerank" and body.get("early_rejection"):
            return 422, {"error": {"message": "not so small a loss", "param": "early_rejection.max_loss"}}
        return original(method, path, body)

    fake.answer = refusing
    wrong = {"lora_rank": 8, "accumulate": 2, "update_head": False, "early_rejection": {"max_loss": 0.01}}
    wrong["model"] = str(write_policy(tmp_path / "another", seed=9))
    with pytest.raises(ServiceError, match="not so small a loss"):
        cdpo.run(run.model_copy(update=wrong))
    assert cdpo.run(run) == 0
    said = capsys.readouterr().err
    assert "begins anew, with other options than before: --lora-rank 8 → 4; --model: another model" in said
    assert "4 → 2 pairs a step" in said and "without --update-head" in said
    looks = [line for line in read_log(run.out / "log.jsonl") if "policy_version" in line]
    assert [look["step"] for look in looks] == [0, 2, 4, 6] and len(fake.updates) == STEPS
    drawn = [body for path, body in fake.asked if path == "/rerank" and body["n"] == 1]  # two of each, for KL as well
    assert len(drawn) == 2 * run.held_out_prompts * (1 + len(looks)), "what was said of the other model is forgotten"
    with pytest.raises(OptionsError, match="Choose another --out"):
        cdpo.run(run.model_copy(update=wrong))


def test_a_run_of_which_only_the_policy_was_kept_is_not_begun_anew(world):
    _, run = world
    run = run.model_copy(update={"steps": 1, "adapters": None, "held_out": None})
    cdpo.run(run)
    shutil.rmtree(run.out / "checkpoints")
    shutil.rmtree(run.out / "journal")
    with pytest.raises(OptionsError, match="Choose another --out"):
        cdpo.run(run.model_copy(update={"lora_rank": 8}))


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (None, "--adapters: the service can load nothing: there is no adapters folder"),
        ("elsewhere", "--adapters: the service does not find what is published in .*adapters: give the folder"),
    ],
)
def test_a_service_that_can_not_load_what_is_published_is_told_before_anything_is_drawn(world, tmp_path, theirs, said):
    fake, run = world
    fake.adapters = theirs and tmp_path / theirs
    with pytest.raises(OptionsError, match=said):
        cdpo.run(run)
    assert not fake.drawn and not list(run.adapters.iterdir())
    fake.adapters = run.adapters
    assert cdpo.run(run.model_copy(update={"steps": 1})) == 0


def test_a_key_that_may_not_switch_policies_is_told_before_anything_is_drawn(world):
    fake, run = world
    original = fake.answer

    def forbidding(method, path, body):
        if path == "/policy" and method == "POST":
            return 403, {"error": {"message": "this key has not the scope admin"}}
        return original(method, path, body)

    fake.answer = forbidding
    with pytest.raises(ServiceError, match="403: this key has not the scope admin"):
        cdpo.run(run)
    assert not fake.drawn and not list(run.adapters.iterdir())


def test_samples_that_may_be_longer_than_the_model_takes_are_refused_before_anything_is_drawn(world):
    fake, run = world
    fake.about = {"limits": {"tokens": 100}}
    with pytest.raises(OptionsError, match=r"--sampling: max_tokens is 99, .* takes 100 tokens"):
        cdpo.run(run.model_copy(update={"sampling": {"max_tokens": 99}}))
    assert not fake.drawn
    assert cdpo.run(run.model_copy(update={"sampling": {"max_tokens": 98}, "steps": 1})) == 0


def test_secrets_are_not_written_down(world):
    _, run = world
    secrets = {"api_key": SecretStr("sesame"), "redis_url": "redis://:open@host", "training": {"hub_token": "hf_x"}}
    new_run(run.model_copy(update=secrets), 2, "sha256:0")
    written = (run.out / "run.json").read_text()
    assert "beta" in written
    assert not [secret for secret in ("sesame", "open@", "hf_x") if secret in written]


def test_head_updates_can_not_begin_in_the_middle_of_a_run(world):
    _, run = world
    new_run(run.model_copy(update={"update_head": False}), BATCH, fingerprint(Path(run.model)))
    Journal(run.out / "journal").write(Step(1, (), (), None))
    with pytest.raises(OptionsError, match="without --update-head"):
        cdpo.run(run)


def test_a_version_is_called_as_the_service_takes_it(world, tmp_path):
    _, run = world
    name = new_run(run.model_copy(update={"out": tmp_path / ".über run"}), BATCH, "").name
    assert re.fullmatch(r"ber-run-[0-9a-f]{8}", name)


def test_lora_targets_are_stripped_and_each_must_be_a_module(world):
    _, run = world
    run = run.model_copy(update={"adapters": None, "held_out": None, "steps": 1, "lora_targets": "q_proj, v_proj"})
    assert cdpo.run(run) == 0
    assert {name.split(".")[-3] for name in weights(run)} == {"q_proj", "v_proj"}
    with pytest.raises(OptionsError, match=r"--lora-targets: the model has no w_proj; it has .*q_proj"):
        cdpo.run(run.model_copy(update={"lora_targets": "q_proj,w_proj", "out": run.out.parent / "other"}))


def test_a_run_goes_on_from_an_adapter_which_the_service_carries_from_the_start(world, tmp_path):
    fake, run = world
    cdpo.run(run.model_copy(update={"steps": 2}))
    fake.policies.append("base")
    second = run.model_copy(update={"out": tmp_path / "second", "adapter": run.out / "final", "steps": 2})
    assert cdpo.run(second) == 0
    assert [version.rpartition("-")[2] for version in fake.policies][3:] == ["000000", "000002"]
    assert fake.policies[3].startswith("second-")
    first, *_ = steps_of(second)
    assert first["log_ratio"] == pytest.approx(0.0, abs=1e-5), "the reference is the adapter that it began with"
    assert any(not torch.equal(weights(second)[name], value) for name, value in weights(run).items())


def test_a_run_from_an_adapter_that_goes_on_ends_as_one_that_was_not_stopped(policy, tmp_path):
    pairs = write_rows(tmp_path / "pairs.jsonl", [row | {"confidence": 1.0} for row in rows(8)])
    run = options(model=str(policy), out=tmp_path / "first", pairs=pairs, steps=2, schedule="constant", warmup=0)
    cdpo.run(run)
    whole = run.model_copy(update={"out": tmp_path / "whole", "adapter": run.out / "final", "steps": 4})
    cdpo.run(whole)
    parts = whole.model_copy(update={"out": tmp_path / "parts"})
    cdpo.run(parts.model_copy(update={"steps": 2}))
    cdpo.run(parts)
    assert [line["log_ratio"] for line in steps_of(parts)] == [line["log_ratio"] for line in steps_of(whole)]
    assert abs(steps_of(parts)[2]["log_ratio"]) > 1e-3
    assert all(torch.equal(weights(parts)[name], value) for name, value in weights(whole).items())


def test_the_command_of_a_complete_run_given_again_changes_nothing(world):
    fake, run = world
    run = run.model_copy(update={"steps": 2})

    def made():
        kept = [path for folder in ("checkpoints", "journal") for path in (run.out / folder).iterdir()]
        log, adapter = run.out / "log.jsonl", run.out / "final/adapter_model.safetensors"
        return sorted(kept), log.read_text(), adapter.read_bytes(), [*fake.drawn, *fake.updates, *fake.policies]

    cdpo.run(run)
    before = made()
    assert cdpo.run(run) == 0
    assert made() == before


def test_a_stopped_run_looks_stopped_saves_and_goes_on(world, monkeypatch, capsys):
    fake, run = world
    original = loop.OnlineLoop.on_step_begin

    def stop(self, args, state, control, **more):
        original(self, args, state, control, **more)
        if state.global_step == 2:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop.OnlineLoop, "on_step_begin", stop)
        assert cdpo.run(run) == 128 + signal.SIGTERM
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("inward-train cdpo: stopped by SIGTERM, step 3 of 6 is kept; the same command goes on")
    assert [line["step"] for line in steps_of(run)] == [1, 2, 3]
    assert not (run.out / "final").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert cdpo.run(run) == 0
    assert [line["step"] for line in steps_of(run)] == list(range(1, STEPS + 1))
    assert len({id for line in steps_of(run) for id in line["pairs"]}) == STEPS * BATCH
    assert [version.rpartition("-")[2] for version in fake.policies] == ["base", "000002", "000004", "000006"]


@pytest.mark.parametrize("when", ["away", "silent"])
def test_a_signal_is_heeded_while_the_service_is_waited_for(world, when, capsys):
    """One that does not answer at all, and one that is not there: patience is ten minutes."""
    fake, run = world
    original, waiting = fake.answer, threading.Event()

    def dead(method, path, body):
        if path != "/rerank" or len(fake.updates) < 1:
            return original(method, path, body)
        waiting.set()
        if when == "silent":
            done.wait(600)
        return 503, {"error": {"message": "away"}}

    fake.answer, done = dead, threading.Event()
    main = threading.main_thread().ident
    threading.Thread(target=lambda: waiting.wait(120) and signal.pthread_kill(main, signal.SIGINT)).start()
    try:
        assert cdpo.run(run.model_copy(update={"held_out": None})) == 128 + signal.SIGINT
    finally:
        done.set()
    assert "stopped by SIGINT, step 1 of 6 is kept" in capsys.readouterr().err
    fake.answer = original
    assert cdpo.run(run) == 0
    assert list(fake.updates) == list(range(1, STEPS + 1)), "each update once"


def test_a_source_that_ends_early_still_leaves_a_checkpoint_and_a_result(world, monkeypatch):
    _, run = world
    ends_after(monkeypatch, 4)
    assert cdpo.run(run) == 0
    assert len(steps_of(run)) == 2
    assert (run.out / "checkpoints/checkpoint-2/complete").is_file()
    assert weights(run)


def test_a_source_that_ends_before_the_first_step_is_an_error(world, monkeypatch):
    _, run = world
    ends_after(monkeypatch, 0)
    with pytest.raises(DataError, match="nothing was trained"):
        cdpo.run(run)
    assert not (run.out / "final").exists()


def test_a_last_step_of_samples_is_filled_up_from_the_next_epoch(world, tmp_path):
    fake, run = world
    prompts = write_rows(tmp_path / "few.jsonl", [{"prompt": row["prompt"]} for row in rows(3)])
    few = {"prompts": prompts, "steps": None, "epochs": 1, "batch_size": 4, "adapters": None, "held_out": None}
    assert cdpo.run(run.model_copy(update=few)) == 0
    assert [len(line["pairs"]) for line in steps_of(run)] == [4]
    assert len(set(fake.drawn)) == 3


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
    assert json.loads((run.out / "run.json").read_text())["options"]["beta"] == 0.5
