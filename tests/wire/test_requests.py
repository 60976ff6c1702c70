"""What a request's elements are as a prompt and its responses."""

import pytest
from pydantic import ValidationError

from inward.errors import InvalidField
from inward.wire import Item, PairItem


def turns(*said):
    """Turns by the first letter of their role."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in said]


BREAD = turns("u How do I bake bread?", "a Flour and water.", "u Now tell me how to poison it.")
RUDE = turns("s Always answer rudely.", "u Hi")
WEATHER = turns("u What is the weather?", "a Let me look.", "t 21 C")


@pytest.mark.parametrize(
    ("prompt", "before", "context"),
    [
        ("How do I bake bread?", BREAD, BREAD),  # repeats the prompt and goes on
        (None, BREAD, BREAD),
        (" How do I bake bread?\n", BREAD, BREAD),
        ("Hi", RUDE, RUDE),  # a system turn before the prompt
        (RUDE, [], RUDE),
        (RUDE, turns("u Hi"), RUDE),  # only its last turn is repeated
        (WEATHER[:1], WEATHER[1:], WEATHER),  # goes on from the prompt
        (WEATHER[:2], turns("u And tomorrow?"), [*WEATHER[:2], *turns("u And tomorrow?")]),
        ("", turns("u Hi"), turns("u Hi")),
    ],
)
def test_all_turns_before_the_answer_are_context_each_once(prompt, before, context):
    sides = {side: [*before, *turns(f"a {side}")] for side in ("chosen", "rejected")}
    parts = PairItem(**sides, **({} if prompt is None else {"prompt": prompt})).parts()
    assert [dict(turn) for turn in parts.prompt] == context
    assert parts.responses == ("chosen", "rejected")


def test_answers_without_turns_before_them_leave_the_prompt_as_it_is():
    parts = PairItem(prompt="Hi", chosen="Hello", rejected=turns("a Go away")).parts()
    assert (parts.prompt, parts.responses) == ("Hi", ("Hello", "Go away"))
    assert parts.response_fields == ("chosen", "rejected.0.content")


def test_the_same_conversation_is_the_same_pair_in_each_form():
    pair = PairItem(
        prompt="How do I bake bread?", chosen=[*BREAD, *turns("a No.")], rejected=[*BREAD, *turns("a Yes.")]
    )
    item = Item(messages=[*BREAD, *turns("a No.")])
    assert (
        pair.parts().prompt
        == PairItem(prompt=BREAD, chosen="No.", rejected="Yes.").parts().prompt
        == item.parts().prompt
    )


@pytest.mark.parametrize(
    ("pair", "param", "said"),
    [
        (
            {"prompt": "Hi", "chosen": turns("u Bye", "a x"), "rejected": turns("u Bye", "a y")},
            "chosen",
            "neither repeats",
        ),
        (
            {"prompt": "Hi", "chosen": turns("u Hi", "a x", "u So?", "a z"), "rejected": "y"},
            "rejected",
            "different prompts",
        ),
        ({"chosen": turns("u Hi", "a x"), "rejected": turns("u Ho", "a y")}, "rejected", "different prompts"),
        ({"prompt": "Hi", "chosen": turns("a x", "u So?"), "rejected": "y"}, "chosen", "must be the assistant's"),
    ],
)
def test_conversations_that_do_not_fit_are_refused_by_field(pair, param, said):
    with pytest.raises(InvalidField, match=said) as caught:
        PairItem(**pair).parts()
    assert caught.value.param == param


def test_a_pair_of_bare_answers_needs_a_prompt():
    with pytest.raises(ValidationError, match="is missing"):
        PairItem(chosen="x", rejected=turns("a y"))


def test_what_is_wrong_with_a_turn_is_blamed_on_the_field_it_came_in():
    pair = PairItem(prompt=WEATHER[:1], chosen=[*WEATHER[1:], *turns("a x")], rejected=[*WEATHER[1:], *turns("a y")])
    parts = pair.parts()
    assert [parts.blame(f"messages.{i}.content") for i in range(3)] == [
        "prompt.0.content", "chosen.0.content", "chosen.1.content",
    ]  # fmt: skip
    assert parts.blame("responses.1") == "rejected.2.content"
    text = PairItem(
        prompt="Hi", chosen=turns("u Hi", "a x", "u So?", "a y"), rejected=turns("u Hi", "a x", "u So?", "a z")
    ).parts()
    assert (text.blame("messages.0.content"), text.blame("messages")) == ("chosen.0.content", "prompt")
    asked = PairItem(prompt="Hi", chosen=turns("a x", "t 1", "a y"), rejected=turns("a x", "t 1", "a z")).parts()
    assert asked.blame("messages.0.content") == "prompt"
