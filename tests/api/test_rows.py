"""Rows of bulk jobs and of annotated files: the same answers as in a request, and errors that name the row's field."""

import json

import pytest

from inward.api.rows import parse, score_rows
from inward.errors import InwardError, NotFound, Overloaded
from inward.wire import ScoringOptions
from support.fake_services import HYBRID, LEGEND

PAIRS = [{"prompt": "question", "chosen": "a" * (i + 1), "rejected": "bbb"} for i in range(5)]
ITEMS = [{"prompt": "question", "response": "a" * (i + 1)} for i in range(5)]


@pytest.mark.parametrize(
    ("kind", "field", "rows"),
    [("margin", "pairs", PAIRS), ("score", "items", ITEMS), ("reward", "items", ITEMS), ("reward", "pairs", PAIRS)],
)
async def test_a_row_gets_what_it_gets_in_a_request(api, kind, field, rows):
    answers = [answer.body() for answer in await score_rows(api.services, kind, rows)]
    expected = (await api.post(f"/{kind}", {field: rows})).json()
    by = {"head": expected["head"], "policy_version": expected["policy_version"]}
    assert answers == [element | by for element in expected[f"{kind}s"]]


async def test_the_head_of_the_confidence_is_named_where_it_is_another_one(api):
    (answer,) = await score_rows(api.services, "margin", PAIRS[:1])
    assert (answer.head, answer.confidence_head) == (LEGEND, HYBRID)


async def test_pairs_and_items_of_one_reward_job_stand_in_their_places(api):
    answers = await score_rows(api.services, "reward", [ITEMS[0], PAIRS[1], ITEMS[2]])
    assert [answer.body().get("score") for answer in answers] == [1.0, None, 3.0]
    assert answers[1].body()["margin"] == -1.0


@pytest.mark.parametrize(
    ("line", "param", "said"),
    [
        ('{"prompt": "a", "chosen": "b"}', "rejected", "rejected is missing"),
        ('{"prompt": "a", "chosen": "b", "rejected": 1}', "rejected", "must be a string"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "x": 1}', "x", "not a field"),
        ('{"prompt": "a", "chosen": "\\ud800", "rejected": "c"}', "chosen", "surrogate"),
        (json.dumps({"prompt": "a" * 300, "chosen": "b", "rejected": "c"}), "chosen", "longer than"),
        ('{"prompt": [{"role": "cook", "content": "a"}], "chosen": "b", "rejected": "c"}', "prompt.0.role", "cook"),
        ('{"prompt": NaN}', None, "NaN is not a JSON number"),
        ("[" * 100_000, None, "nested too deeply"),
        ("{", None, "not JSON"),
        ("[1]", None, "not a JSON object"),
    ],
)
async def test_a_bad_row_has_an_error_that_names_its_own_field_and_harms_no_others(api, line, param, said):
    answers = await score_rows(api.services, "margin", [PAIRS[0], parse(line), PAIRS[1]])
    error = answers[1].error
    assert error is not None
    assert error.param == param
    assert said in error.message
    assert [answer.body().get("margin") for answer in answers] == [-2.0, None, -1.0]


async def test_rows_that_are_all_bad_are_no_failure_of_the_whole(api):
    answers = await score_rows(api.services, "score", [parse("x"), {"prompt": "a"}])
    assert [bool(answer.error) for answer in answers] == [True, True]
    assert api.intake.calls == []


async def test_text_is_cut_where_that_is_asked_for(api):
    row = {"prompt": "a" * 300, "response": "b"}
    (answer,) = await score_rows(api.services, "score", [row], options=ScoringOptions(truncate=True))
    assert answer.body()["truncated"] is True


async def test_what_is_no_rows_fault_is_raised(api):
    with pytest.raises(NotFound):
        await score_rows(api.services, "margin", PAIRS, head="nope")
    api.intake.error = Overloaded("full", retry_after=1)
    with pytest.raises(Overloaded):
        await score_rows(api.services, "margin", PAIRS)


def test_a_parsed_row_is_a_value_or_an_error():
    assert parse('{"a": 1}') == {"a": 1}
    assert isinstance(parse("1"), InwardError)
