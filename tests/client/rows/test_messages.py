import pytest

from inward_client.rows import DataError, messages, text

SAID = {"role": "assistant", "content": "I will not."}


@pytest.mark.parametrize(
    "turn",
    [
        SAID,
        {"from": "gpt", "value": "I will not."},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "I will "}, {"type": "output_text", "text": "not."}],
        },
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "I will not."}]},
        {"role": "assistant", "content": None, "refusal": "I will not."},
        {"role": "assistant", "content": "I will not.", "tool_calls": [], "function_call": None, "name": "x"},
        {"role": "assistant", "content": ["I will not."]},
    ],
)
def test_a_message_is_read_in_every_form_that_is_text(turn):
    assert messages([turn], "chosen") == messages(turn, "chosen") == [SAID]


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"role": "assistant", "content": None}, "'chosen', message 1 has no content"),
        ({"role": "assistant"}, "has no content"),
        ({"role": "assistant", "content": []}, "has no content"),
        ({"role": "assistant", "content": {"text": "a"}}, "neither a text nor a list of parts"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, "calls a tool"),
        ({"role": "assistant", "content": "a", "function_call": {"name": "f"}}, "calls a tool"),
        ({"from": "function_call", "value": "f()"}, "calls a tool"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "a part of type 'image_url'"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}, "a part of type 'image'"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "a part of type 'text' that is no text"),
        ({"role": "user", "content": [3]}, "a part of type 'int'"),
        ({"role": "cook", "content": "a"}, "has the role 'cook', which is none of system, developer, user"),
        ({"role": None, "content": "a"}, "has the role None"),
    ],
)
def test_what_is_no_text_is_refused_by_name(turn, said):
    with pytest.raises(DataError, match=said) as error:
        messages([turn], "chosen")
    assert error.value.column == "chosen"


def test_hidden_characters_in_a_role_are_not_printed_as_they_are():
    with pytest.raises(DataError) as error:
        messages([{"role": "\x1b[31m\u202e", "content": "a"}], "chosen")
    assert "\x1b" not in error.value.message
    assert "\u202e" not in error.value.message


def test_a_text_is_a_text():
    assert text("a", "here") == "a"
