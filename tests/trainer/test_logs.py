import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from inward_trainer.logs import Log, read_log


def test_a_run_that_goes_on_drops_the_lines_of_steps_that_are_done_again(tmp_path):
    log = Log(tmp_path, 0, tensorboard=False)
    for step in range(5):
        log.write(step, {"loss": float(step)})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "los')  # where a crash cut it short
    log = Log(tmp_path, 3, tensorboard=False)
    assert [line["step"] for line in log.lines] == [0, 1, 2, 3]
    log.write(4, {"loss": 40.0})
    assert read_log(tmp_path / "log.jsonl")[-1] == {"step": 4, "loss": 40.0}
    assert len(read_log(tmp_path / "log.jsonl")) == 5


def test_what_is_not_finite_is_null(tmp_path):
    Log(tmp_path, 0, tensorboard=False).write(1, {"grad_norm": float("inf"), "loss": float("nan"), "pairs": ["a"]})
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {
        "step": 1,
        "grad_norm": None,
        "loss": None,
        "pairs": ["a"],
    }


def test_tensorboard_has_the_numbers_and_the_distribution(tmp_path):
    log = Log(tmp_path, 0)
    log.write(1, {"loss": 0.5, "policy_version": "base", "pairs": ["a"]})
    log.histogram(1, "hybrid/rewards", [0.1, 0.2])
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert events.Scalars("loss")[0].value == 0.5
    assert events.Tags()["histograms"] == ["hybrid/rewards"]
