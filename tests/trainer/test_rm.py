"""Reward models with margins, in TRL's real trainer on a tiny model, with a stand-in for the service."""

import json
import math
import signal

import pytest
import torch
from safetensors.torch import load_file

from inward_trainer import rm
from inward_trainer.errors import DataError, OptionsError, Stopped
from inward_trainer.logs import read_log
from inward_trainer.models import load_tokenizer
from inward_trainer.options import RewardOptions
from inward_trainer.pairs import read_row
from inward_trainer.runs import locked
from support.fake_inward import FakeInward, score, served, service
from support.small_policy import rows, write_policy, write_rows


class Killed(BaseException):
    """What no handler in between catches, as nothing survives a ``kill -9``."""


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return write_policy(tmp_path_factory.mktemp("policy"))


def options(policy, tmp_path, **more):
    pairs = write_rows(tmp_path / "pairs.jsonl", more.pop("rows", rows(8)))
    quick = {
        "batch_size": 4, "learning_rate": 1e-2, "max_length": 128, "full": True, "bf16": False, "tensorboard": False,
        "training": {"disable_tqdm": True},
    }  # fmt: skip
    return RewardOptions(**{**quick, "model": str(policy), "pairs": pairs, "out": tmp_path / "run", **more})


def with_margin(margin, n=8):
    return [row | {"margin": margin} for row in rows(n)]


def dropped_file(run):
    return (run.out / "dropped.jsonl").read_text().splitlines()


def losses(run):
    return [line["loss"] for line in read_log(run.out / "log.jsonl")]


def rows_of(run, fake):
    with service(fake) as asked:
        run.out.mkdir(exist_ok=True)
        return rm.read_rows(run, run.pairs, rm.Tokeniser(load_tokenizer(run.model)), asked)


def test_learns_to_rank_and_reports_it(policy, tmp_path, capsys):
    run = options(policy, tmp_path, rows=with_margin(0.5), margins="column", epochs=6)
    run = run.model_copy(update={"held_out": run.pairs})
    assert rm.run(run) == 0
    report = json.loads((run.out / "report.json").read_text())
    right = {"held_out_pairs": 8, "held_out_accuracy": 1.0, "held_out_accuracy_se": 0.0}
    assert report == {"pairs": 8, "margins": "column", **right}
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == report
    assert (run.out / "final/model.safetensors").is_file()
    assert len(losses(run)) == 12


def test_every_checkpoint_is_judged_and_the_best_is_kept(policy, tmp_path):
    run = options(policy, tmp_path, rows=with_margin(0.5), margins="column", epochs=4, checkpoint_every=2)
    assert rm.run(run.model_copy(update={"eval_pairs": run.pairs, "eval_most": 6})) == 0
    judged = [line for line in read_log(run.out / "log.jsonl") if "eval/loss" in line]
    assert [line["step"] for line in judged] == [0, 2, 4, 6, 8]
    assert judged[-1]["eval/accuracy"] == 1.0 and judged[-1]["eval/loss"] < judged[0]["eval/loss"]
    assert all(line["eval/loss_se"] > 0 for line in judged)
    best = min(judged[1:], key=lambda line: line["eval/loss"])
    assert json.loads((run.out / "best/evaluation.json").read_text()) == best
    assert (run.out / "best/model.safetensors").is_file()


def test_the_loss_of_a_pair_is_that_of_its_difference(policy, tmp_path):
    run = options(policy, tmp_path, margins="none")
    model = rm.load_model(rm.AutoModelForSequenceClassification, policy, run, num_labels=1)
    (loss, margin), (other, _) = rm.pair_losses(model, [([1, 5, 9], [1, 7]), ([1, 7], [1, 5, 9])])
    assert loss == pytest.approx(float(-torch.nn.functional.logsigmoid(torch.tensor(margin))), rel=1e-5)
    assert other == pytest.approx(loss + margin, rel=1e-4)


@pytest.mark.parametrize("full", [True, False])
def test_the_same_seed_begins_with_the_same_head_with_and_without_margins(policy, tmp_path, full):
    """The head is drawn anew by whoever loads the model: both must draw the same, or no comparison means anything."""
    first = {}
    for i, (name, margin) in enumerate((("without", 0.0), ("again", 0.0), ("with", 3.0))):
        (tmp_path / name).mkdir()
        torch.manual_seed(i)
        run = options(
            policy, tmp_path / name, rows=with_margin(margin), margins="column", steps=1, full=full, learning_rate=1e-12
        )
        assert rm.run(run) == 0
        first[name] = losses(run)[0]
    assert first["again"] == first["without"]
    z = -torch.log(torch.expm1(torch.tensor(first["without"])))  # the mean difference, if all were alike
    assert first["with"] == pytest.approx(float(-torch.nn.functional.logsigmoid(z - 3.0)), abs=0.05)


def test_margins_come_from_the_service_once(policy, tmp_path):
    fake, run = FakeInward(), options(policy, tmp_path, epochs=1)
    found = rows_of(run, fake)
    pairs = [read_row(row, str(i)) for i, row in enumerate(rows(8))]
    bins = [min(1.0, max(0.0, score(pair.chosen) - score(pair.rejected))) for pair in pairs]
    assert [row.margin for row in found] == bins
    assert rows_of(run, fake) == found
    assert len([path for path, _ in fake.asked if path == "/margin"]) == 1
    constant = rows_of(run.model_copy(update={"margins": "constant"}), fake)
    assert {row.margin for row in constant} == {sum(bins) / 8}
    (run.out / "final").mkdir()
    with pytest.raises(DataError, match="not of --head another"):
        rows_of(run.model_copy(update={"head": "another"}), fake)
    write_rows(run.pairs, rows(8)[::-1])  # a row's number alone is not the pair
    with pytest.raises(DataError, match="of 8 other pairs than the 8"):
        rows_of(run, fake)


def test_margins_of_other_pairs_or_another_head_keep_no_run_from_beginning(policy, tmp_path):
    heads = ({"name": "legend", "kind": "legend"}, {"name": "another", "kind": "legend"})
    fake, run = FakeInward(heads=heads), options(policy, tmp_path, epochs=1)
    rows_of(run, fake)
    write_rows(run.pairs, rows(4))
    assert {row.id for row in rows_of(run, fake)} == {"0", "1", "2", "3"}
    rows_of(run.model_copy(update={"head": "another"}), fake)
    assert [body["head"] for path, body in fake.asked if path == "/margin"] == ["legend", "legend", "another"]


def test_a_reward_model_that_was_not_begun_is_begun_anew_with_another_one(policy, tmp_path, capsys):
    with served(FakeInward()) as url:
        run = options(policy, tmp_path, url=url, steps=1)
        wrong = {"model": str(write_policy(tmp_path / "another", seed=9)), "attn_implementation": "no-such-attention"}
        with pytest.raises(OptionsError, match="can't be loaded"):
            rm.run(run.model_copy(update=wrong))
        first = (run.out / "margins.jsonl").stat().st_ino
        assert rm.run(run) == 0
    assert "begins anew, with other options than before: --model: another model" in capsys.readouterr().err
    assert (run.out / "margins.jsonl").stat().st_ino != first, "the service serves another model now"


def test_what_is_dropped_is_written_down_with_its_reason(policy, tmp_path, caplog):
    long = {"prompt": "Birds? " * 60, "chosen": " Seven.", "rejected": " No."}
    run = options(policy, tmp_path, rows=[*rows(8), long], drop_disagreeing=True)
    kept = rows_of(run, FakeInward())
    dropped = {line["id"]: line["reason"] for line in map(json.loads, dropped_file(run))}
    assert {row.id for row in kept} | dropped.keys() == {str(i) for i in range(9)}
    assert dropped["8"].endswith("more than --max-length 128") or dropped["8"] == "the head disagrees with the label"
    flipped = [i for i, row in enumerate(rows(8)) if score(row["chosen"]) <= score(row["rejected"])]
    assert flipped and all(dropped[str(i)] == "the head disagrees with the label" for i in flipped)
    assert f"{len(dropped)} of 9 pairs are left out: " in caplog.text


def test_a_tie_is_not_dropped_as_a_label_that_the_head_disagrees_with(policy, tmp_path):
    tie = {"prompt": "Birds?", "chosen": " Seven.", "rejected": " Seven."}
    kept = rows_of(options(policy, tmp_path, rows=[*rows(8), tie], drop_disagreeing=True), FakeInward())
    assert "8" in {row.id for row in kept}


@pytest.mark.parametrize("margins", ["bin", "margin_scaled", "constant"])
def test_a_head_without_a_scale_of_margins_is_refused(policy, tmp_path, margins):
    class Unscaled(FakeInward):
        def _margin(self, body):
            found = super()._margin(body)["margins"]
            return {"margins": [one | {"bin": None, "margin_scaled": None} for one in found]}

    with pytest.raises(DataError, match=rf"--margins {margins}: the head has no scale of margins"):
        rows_of(options(policy, tmp_path, margins=margins), Unscaled())


def test_what_is_missing_is_told(policy, tmp_path):
    with pytest.raises(OptionsError, match="give --url"):
        rm.run(options(policy, tmp_path))
    for fake, said in (
        (FakeInward(heads=({"name": "kind", "kind": "hybrid"},)), r"no head of kind legend; it has: kind \(hybrid\)"),
        (FakeInward(about={"fingerprint": "sha256:other"}), "not what the service serves"),
    ):
        with served(fake) as url, pytest.raises(OptionsError, match=said):
            rm.run(options(policy, tmp_path, url=url))


@pytest.mark.parametrize(
    ("margin", "said"), [(math.nan, "nan"), ("high", "'high'"), ("", "missing"), (None, "missing")]
)
def test_a_margin_that_is_no_number_is_named_by_its_row(policy, tmp_path, margin, said):
    given = [*with_margin("0.5", 3), *with_margin(margin, 1)]
    with pytest.raises(DataError, match=f"row 3: `margin` is {said}"):
        rm.run(options(policy, tmp_path, rows=given, margins="column"))


def test_held_out_pairs_that_are_not_there_are_told_before_anything_is_learnt(policy, tmp_path):
    run = options(policy, tmp_path, margins="none", held_out=tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="nowhere"):
        rm.run(run)
    assert not (run.out / "log.jsonl").exists()


def test_another_trainer_in_the_folder_is_refused(policy, tmp_path):
    run = options(policy, tmp_path, margins="none")
    with locked(run.out), pytest.raises(OptionsError, match="another trainer works"):
        rm.run(run)


def weights(run):
    return load_file(run.out / "final/model.safetensors")


def test_a_run_that_is_stopped_and_killed_ends_as_one_that_is_not(policy, tmp_path, monkeypatch, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    shape = {"rows": with_margin(0.5), "margins": "column", "epochs": 4, "checkpoint_every": 3}
    run = options(policy, whole, **shape)
    assert rm.run(run) == 0
    again = options(policy, broken, **shape)

    def stop(self, args, state, control, **more):
        if state.global_step == 1:
            signal.raise_signal(signal.SIGINT)
        if state.global_step == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(rm.RewardLoop, "on_step_begin", stop)
        assert rm.run(again) == 128 + signal.SIGINT
        assert "rm: stopped by SIGINT, step 2 of 8 is kept" in capsys.readouterr().err
        assert not (again.out / "final").exists()
        with pytest.raises(Killed):
            rm.run(again)
    assert rm.run(again) == 0
    assert losses(again) == losses(run)
    assert all(torch.equal(weights(again)[name], value) for name, value in weights(run).items())


@pytest.mark.parametrize("length", [{"steps": 3}, {"epochs": 2}, {"steps": 6, "stop_after": 1}])
def test_the_command_of_a_complete_run_given_again_changes_nothing(policy, tmp_path, monkeypatch, length):
    run = options(policy, tmp_path, rows=with_margin(0.5), margins="column", checkpoint_every=1, **length)
    if "stop_after" in length:
        run = run.model_copy(update={"eval_pairs": run.pairs})
        judged = iter([0.7, 0.5, 0.6])
        monkeypatch.setattr(rm, "pair_losses", lambda model, pairs: [(next(judged), 1.0)] * len(pairs))

    def made():
        files = (run.out / "log.jsonl", run.out / "final/model.safetensors")
        return sorted((run.out / "checkpoints").iterdir()), [file.read_bytes() for file in files]

    rm.run(run)
    before = made()
    assert rm.run(run) == 0
    assert made() == before


def test_a_run_that_is_stopped_before_it_knows_its_steps_tells_none(policy, tmp_path, monkeypatch, capsys):
    def stopped(*_):
        raise Stopped(signal.SIGTERM)

    run = options(policy, tmp_path)
    (run.out / "checkpoints/checkpoint-3").mkdir(parents=True)
    (run.out / "checkpoints/checkpoint-3/complete").touch()
    monkeypatch.setattr(rm, "read_rows", stopped)
    assert rm.run(run) == 128 + signal.SIGTERM
    assert "rm: stopped by SIGTERM, step 3 is kept;" in capsys.readouterr().err
