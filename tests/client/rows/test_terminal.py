import pytest

from inward_client.rows import DataError, get, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\rb\x00\x7f\x9b", "a\\rb\\x00\\x7f\\x9b"),
        ("\u202eabc\u2066\u200f\u061c", "\\u202eabc\\u2066\\u200f\\u061c"),
        ("a\u2028b\ud800", "a\\u2028b\\ud800"),
        ("two\nlines\tö 你好 🙂 \u00a0\u200d", "two\nlines\tö 你好 🙂 \u00a0\u200d"),
    ],
)
def test_a_terminal_gets_no_control_characters_and_no_marks_of_direction(text, shown):
    assert printable(text) == shown


def test_an_error_shows_no_hidden_characters_of_names():
    with pytest.raises(DataError) as error:
        get({"\x1b[2J\u202e": 1}, "prompt")
    assert error.value.message == "'prompt' is missing; the row has \\x1b[2J\\u202e"
