"""The two clients never drift, and what they read is what the service sends."""

import dataclasses
import inspect

import pytest

import inward.wire as wire
import inward_client
from inward_client import AsyncInward, Inward, answers
from inward_client.errors import StatusError

PUBLIC = [name for name, _ in inspect.getmembers(Inward, inspect.isfunction) if not name.startswith("_")]


def test_both_clients_have_the_same_methods():
    assert [
        name for name, _ in inspect.getmembers(AsyncInward, inspect.isfunction) if not name.startswith("_")
    ] == PUBLIC


@pytest.mark.parametrize("name", [*PUBLIC, "__init__"])
def test_a_method_has_the_same_arguments_answer_and_words_in_both(name):
    one, other = getattr(Inward, name), getattr(AsyncInward, name)
    mine, theirs = inspect.signature(one), inspect.signature(other)
    for parameter in mine.parameters:
        if parameter != "http":
            assert mine.parameters[parameter] == theirs.parameters[parameter]
    assert list(mine.parameters) == list(theirs.parameters)
    assert mine.return_annotation == theirs.return_annotation.replace("AsyncIterator", "Iterator")
    assert one.__doc__ == other.__doc__
    if name != "__init__":
        assert one.__doc__
        assert inspect.iscoroutinefunction(other) or (
            inspect.isasyncgenfunction(other) and inspect.isgeneratorfunction(one)
        )
        assert not inspect.iscoroutinefunction(one)


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (answers.Margin, wire.Margin), (answers.Score, wire.Score), (answers.RewardPair, wire.RewardPair),
        (answers.Ranked, wire.Ranked), (answers.BestAgainstWorst, wire.BestAgainstWorst),
        (answers.MarginAnswer, wire.MarginAnswer), (answers.ScoreAnswer, wire.ScoreAnswer),
        (answers.RewardAnswer, wire.RewardAnswer), (answers.RerankAnswer, wire.RerankAnswer),
        (answers.Usage, wire.TokenUsage), (answers.Head, wire.NamedHead), (answers.ItemError, wire.ErrorDetail),
    ],
)  # fmt: skip
def test_every_field_that_the_service_sends_is_read(mine, theirs):
    assert set(theirs.model_fields) <= {field.name for field in dataclasses.fields(mine)}


def test_there_is_one_error_class_for_each_status_that_the_service_gives():
    from inward.errors import InwardError, SetupError, tree

    sent = {error.status for error in tree(InwardError) if not issubclass(error, SetupError)}
    assert sent <= set(StatusError.by_status)


def test_what_is_public_is_listed_and_belongs_to_the_package():
    for name in inward_client.__all__:
        assert getattr(inward_client, name).__module__.startswith("inward_client.")
