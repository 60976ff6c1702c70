import pytest

from inward.commands.options import add_settings, settings_of
from inward.errors import SetupError
from inward.settings import Settings


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
