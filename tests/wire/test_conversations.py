"""A row is the same pair wherever it is read: routes and the client's reader of rows put contexts together alike."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inward.errors import InvalidField
from inward.wire.conversations import Context, joined
from inward_client.rows import DataError
from inward_client.rows.messages import joined as joined_by_the_client

ROLES = st.sampled_from(["system", "user", "assistant", "tool"])
TURNS = st.lists(
    st.fixed_dictionaries({"role": ROLES, "content": st.sampled_from(["a", "b", " a\n"])}),
    min_size=1,
    max_size=4,
)


@given(TURNS, TURNS)
def test_routes_and_reader_agree_on_every_context(asked, said):
    try:
        expected = joined_by_the_client(asked, said, "chosen")
    except DataError:
        with pytest.raises(InvalidField, match="neither repeats the prompt nor goes on from it"):
            joined(Context.of(asked, "prompt"), Context.of(said, "chosen"), "chosen")
        return
    context = joined(Context.of(asked, "prompt"), Context.of(said, "chosen"), "chosen")
    assert context.turns == expected
    assert len(context.fields) == len(context.turns)


def test_a_question_that_is_asked_again_later_does_not_swallow_the_first_one():
    asked, said = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    context = joined(Context.of_text("a", "prompt"), Context.of([said, asked], "chosen"), "chosen")
    assert context.turns == [asked, said, asked]
    assert context.fields == ("prompt", "chosen.0", "chosen.1")


def test_a_prompt_may_be_the_last_question_of_the_conversation():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert joined(Context.of_text("c", "prompt"), Context.of(turns, "chosen"), "chosen").turns == turns
