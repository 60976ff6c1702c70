import json

import pytest

from inward.__main__ import main
from inward.commands.options import add_settings, settings_of
from inward.errors import SetupError
from inward.settings import Settings, unknown_variables


def parse(*arguments):
    import argparse

    parser = argparse.ArgumentParser()
    add_settings(parser)
    return settings_of(parser.parse_args(arguments))


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_explained(name):
    assert Settings.model_fields[name].description, f"{name} has no docstring"


def test_options_come_before_the_environment_and_the_environment_before_defaults(monkeypatch):
    monkeypatch.setenv("INWARD_PORT", "9001")
    monkeypatch.setenv("INWARD_HOST", "127.0.0.2")
    settings = parse("--port", "9002")
    assert (settings.port, settings.host, settings.model) == (9002, "127.0.0.2", "smollm2")


def test_a_value_that_a_setting_does_not_take_is_named():
    with pytest.raises(SetupError, match="--max-items"):
        parse("--max-items", "none")


def test_keys_are_split_and_never_shown():
    settings = parse("--api-keys", "first-key, second-key")
    assert {key.get_secret_value() for key in settings.api_keys} == {"first-key", "second-key"}
    assert "first-key" not in repr(settings) + str(settings.resolved())
    assert settings.resolved()["api_keys"] == 2


def test_flags_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("INWARD_METRICS_OPEN", "true")
    assert parse("--no-metrics-open").metrics_open is False


@pytest.fixture
def file(tmp_path):
    def write(text):
        (tmp_path / "inward.yaml").write_text(text)
        return str(tmp_path / "inward.yaml")

    return write


def test_a_file_comes_before_defaults_the_environment_before_the_file_and_options_before_both(file, monkeypatch):
    path = file("port: 9001\nmax_items: 7\nquota: 5\nvllm_options: {tensor_parallel_size: 2}\napi_keys: [a-key]\n")
    monkeypatch.setenv("INWARD_MAX_ITEMS", "8")
    monkeypatch.setenv("INWARD_QUOTA", "")  # as compose writes what is not set
    settings = parse("--config", path, "--port", "9002")
    assert (settings.port, settings.max_items, settings.quota) == (9002, 8, 5)
    assert settings.vllm_options == {"tensor_parallel_size": 2} and len(settings.api_keys) == 1
    monkeypatch.setenv("INWARD_CONFIG", path)
    assert parse().port == 9001


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_itmes: 7", r"inward\.yaml: there is no setting 'max_itmes'; did you mean max_items\?"),
        ("max_items: none", r"inward\.yaml: max_items: Input should be a valid integer"),
        ("[1, 2]", "must hold settings by their names"),
        ("a: [", "can't be read as YAML"),
        ("config: more.yaml", "there is no setting 'config'"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_and_says_why(file, text, said):
    with pytest.raises(SetupError, match=said):
        parse("--config", file(text))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SetupError, match=r"none\.yaml can't be read as YAML: No such file"):
        parse("--config", str(tmp_path / "none.yaml"))


def test_an_empty_file_changes_nothing(file):
    assert parse("--config", file("# nothing yet\n")).port == 8080


def test_variables_that_are_no_settings_are_found_with_what_was_probably_meant():
    names = ["INWARD_MAX_ITMES", "INWARD_ZZZ", "INWARD_URL", "INWARD_TRAIN_STEPS", "INWARD_PORT", "inward_port", "PATH"]
    assert unknown_variables(names) == {"INWARD_MAX_ITMES": "INWARD_MAX_ITEMS", "INWARD_ZZZ": None}


def test_a_command_names_them_before_it_runs(monkeypatch, capsys):
    monkeypatch.setenv("INWARD_MODLE", "toy")
    assert main(["info", "--json", "--model", "toy"]) == 0
    said = capsys.readouterr()
    assert "there is no setting INWARD_MODLE; did you mean INWARD_MODEL?" in said.err
    assert json.loads(said.out)["backbone"]["name"] == "toy"
