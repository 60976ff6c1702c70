import argparse
import errno
import re

import pytest
import torch
from safetensors import SafetensorError
from trl import DPOConfig, RewardConfig

from inward.stores.keys import Keys
from inward_trainer.__main__ import main, mendable, parser
from inward_trainer.cdpo import check
from inward_trainer.errors import OptionsError
from inward_trainer.models import OWN, arguments, configuration
from inward_trainer.options import CdpoOptions, ExportOptions, RewardOptions, add_options, read_options, recipes
from inward_trainer.parts import stream_key
from inward_trainer.sources.samples import SAMPLING

COMMANDS = {"cdpo": CdpoOptions, "rm": RewardOptions, "export": ExportOptions}


def read(words=(), environment=None, options=CdpoOptions):
    own = argparse.ArgumentParser()
    add_options(own, options)
    return read_options(options, own.parse_args(list(words)), environment or {})


def test_options_win_over_the_environment_over_the_recipe_over_defaults(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('beta = 1.5\nmodel = "a"\nsteps = 3\nsampling = {max_tokens = 8}\n')
    environment = {
        "INWARD_TRAIN_MODEL": "b",
        "INWARD_TRAIN_STEPS": "4",
        "INWARD_TRAIN_RECIPE": str(recipe),
        "INWARD_TRAIN_UPDATE_HEAD": "true",
    }
    found = read(["--steps", "5", "--no-tensorboard"], environment)
    assert (found.beta, found.model, found.steps, found.sampling) == (1.5, "b", 5, SAMPLING | {"max_tokens": 8})
    assert (found.update_head, found.tensorboard, found.learning_rate) == (True, False, 1e-5)


def test_the_key_is_never_shown():
    assert "secret" not in repr(read(environment={"INWARD_TRAIN_API_KEY": "secret"}))


@pytest.mark.parametrize(
    "words", [["--steps", "0"], ["--confidence", "sometimes"], ["--gamma", "1.2"], ["--recipe", "no-such"]]
)
def test_a_value_that_an_option_does_not_take_is_named(words):
    with pytest.raises(OptionsError, match=words[0] if words[0] != "--recipe" else "no-such"):
        read(words)


@pytest.mark.parametrize("name", recipes())
def test_bundled_recipes_are_valid(name):
    found = read(["--recipe", name], options=RewardOptions if name.startswith("rm") else CdpoOptions)
    assert found.model


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({}, "--source file needs --pairs"),
        ({"source": "samples", "url": "u"}, "--source samples needs --prompts"),
        ({"source": "samples", "prompts": "p"}, "--source samples needs --url"),
        ({"source": "stream", "redis_url": "r"}, "--steps"),
        ({"pairs": "p", "update_head": True}, "--update-head needs --url"),
        ({"update_head": True, "early_rejection": {"max_loss": 0.1}}, "max_loss is calibrated for one"),
        ({"pairs": "p", "url": "u", "adapters": "a", "full": True}, "leave out --full"),
        ({"pairs": "p", "url": "u", "held_out": "h"}, "--held-out needs --adapters"),
        ({"pairs": "p", "stop_after": 2}, "--stop-after needs --eval-pairs"),
        ({"pairs": "p", "job": "j1"}, "--job is for --source job"),
        ({"pairs": "p", "prompts": "q"}, "--prompts is for --source samples"),
        ({"pairs": "p", "url": "u", "adapters": "a", "adapter": "typo"}, "--adapter: typo has no adapter_config.json"),
    ],
)
def test_what_is_missing_is_told_before_anything_is_loaded(given, missing):
    with pytest.raises(OptionsError, match=missing):
        check(CdpoOptions(**given))


@pytest.mark.parametrize(
    ("kind", "given", "option"),
    [
        (DPOConfig, "gradient_accumulation_steps", "--accumulate"),
        (DPOConfig, "per_device_train_batch_size", "--batch-size"),
        (DPOConfig, "beta", "--beta"),
        (DPOConfig, "loss_type", "the command's own"),
        (RewardConfig, "max_steps", "--steps"),
        (RewardConfig, "save_steps", "--checkpoint-every"),
        (RewardConfig, "seed", "--seed"),
    ],
)
def test_an_argument_that_an_option_of_ours_sets_is_refused_beside_it(kind, given, option):
    with pytest.raises(OptionsError, match=f"--training: {given} is {option}"):
        configuration(kind, CdpoOptions(training={given: 3}))


def test_only_what_depends_on_no_option_of_ours_can_be_given_otherwise():
    assert arguments(CdpoOptions()).keys() - OWN.keys() == {
        "use_cpu", "dataloader_pin_memory", "logging_nan_inf_filter", "ddp_timeout",
    }  # fmt: skip
    assert all(
        own == "the command's own" or own[2:].replace("-", "_") in CdpoOptions.model_fields for own in OWN.values()
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(command, capsys):
    with pytest.raises(SystemExit) as end:
        parser().parse_args([command, "--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0
    for name, field in COMMANDS[command].model_fields.items():
        assert f"--{name.replace('_', '-')}" in said and field.description
    assert "inward-train" in said.rpartition("--")[0]


def test_the_streams_key_is_the_services(tmp_path):
    (tmp_path / "llama").mkdir()
    for given, key in (
        ({"model": "org/llama"}, Keys("org/llama")),
        ({"model": str(tmp_path / "llama")}, Keys("llama")),
        ({"model": "org/llama", "queue": "q"}, Keys("q")),
    ):
        assert stream_key(CdpoOptions(**given, stream="dpo")) == key.scores("dpo")


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (b"beta = \n", "mine.toml is no TOML: Invalid value (at line 1, column 8)"),
        (b"\xff\xfe", "mine.toml is no TOML: 'utf-8' codec can't decode byte 0xff"),
        (b'beta = "x"', "mine.toml: beta: Input should be a valid number"),
        (b"teapot = 3", "mine.toml: teapot is no option of this command"),
        (b'sampling = "{"', "mine.toml: sampling: "),
        (None, "mine.toml can't be read: Is a directory"),
    ],
)
def test_a_recipe_that_can_not_be_used_is_named(written, said, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.mkdir() if written is None else recipe.write_bytes(written)
    with pytest.raises(OptionsError, match=re.escape(said)) as refused:
        read(["--recipe", str(recipe)])
    assert str(recipe) in str(refused.value)


def test_a_value_is_blamed_on_where_it_was_given(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('beta = "x"\nsteps = 0\n')
    with pytest.raises(OptionsError) as refused:
        read(["--recipe", str(recipe), "--beta", "y"], {"INWARD_TRAIN_GAMMA": "2"})
    named = [problem.rpartition(": ")[0] for problem in str(refused.value).split("; ")]
    assert sorted(named) == sorted(["--beta", "INWARD_TRAIN_GAMMA", f"--recipe {recipe}: steps"])


@pytest.mark.parametrize("words", [["cdpo"], ["rm"], ["export"], ["paper", "--tables", "report"]], ids=lambda w: w[0])
@pytest.mark.parametrize("there", ["file", "file/below", "nowhere"])
def test_a_file_in_the_place_of_a_folder_is_told_before_anything_is_done(words, there, capsys, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    out = tmp_path / there
    assert main([*words, "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    in_the_way = tmp_path / there.partition("/")[0]
    assert line == f"inward-train {words[0]}: --out: {in_the_way} is there and is no folder: name another"
    if words == ["cdpo"]:
        with pytest.raises(OptionsError, match=r"--adapters: .* is no folder"):
            read(["--adapters", str(out)])


PAIRS = ["--pairs", "no-such-pairs.jsonl"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cdpo", "--model", "m"], "--source file needs --pairs"),
        (["cdpo", *PAIRS], "--model: say which model to train"),
        (["cdpo", *PAIRS, "--model", "service"], "--model service needs --url"),
        (["cdpo", *PAIRS, "--model", "./no-such-folder"], "--model: there is no folder no-such-folder"),
        (["rm", "--model", "m"], "--pairs: say what to train on"),
        (["rm", *PAIRS, "--stop-after", "2"], "--stop-after needs --eval-pairs"),
        (["rm", *PAIRS, "--model", "tests"], "holds no config.json"),
        (
            ["cdpo", *PAIRS, "--training", '{"no_such_argument": 1}'],
            "--training: the trainer takes no no_such_argument",
        ),
        (["cdpo", *PAIRS, "--schedule", "sometimes"], "the trainer refuses its options: sometimes is not"),
        (["cdpo", *PAIRS, "--report-to", "no-such-tracker"], "--report-to no-such-tracker: it is not installed"),
        (["cdpo", *PAIRS, "--url", "localhost:8080", "--model", "m"], "--url: url must begin with http"),
    ],
)
def test_an_error_that_can_be_mended_is_one_line(words, said, capsys, tmp_path):
    assert main([*words, "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"inward-train {words[0]}: ")
    assert said in line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out/log.jsonl"), "the disk is full (out/log.jsonl)"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "the disk is full;",
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc:668] PytorchStreamWriter failed writing file"),
            "disk is full",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/run.json"), "/run.json can't be written or read"),
        (
            NotADirectoryError(errno.ENOTDIR, "Not a directory", "out/journal/1"),
            "out/journal/1 can't be written or read",
        ),
        (OSError(errno.EROFS, "Read-only file system", "out/lock"), "out/lock can't be written or read: Read-only"),
        (ModuleNotFoundError("no", name="trackio"), "pip install trackio"),
        (torch.OutOfMemoryError("CUDA out of memory"), "a smaller --batch-size"),
        (KeyError("a defect"), None),
    ],
)
def test_full_disks_missing_packages_and_small_devices_are_told_and_defects_are_not_hidden(error, said):
    found = mendable(error)
    assert found is None if said is None else said in found
