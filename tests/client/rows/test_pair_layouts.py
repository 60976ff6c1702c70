import json

import pytest

from inward_client.rows import (
    LAYOUTS,
    DataError,
    Pair,
    PairReader,
    read_item,
    read_pair,
    read_prompt,
    recognise,
    transcript,
    which,
)

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
OTHER = {"role": "assistant", "content": "Go away"}
EXAMPLES = {
    "hh": {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go away"},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "Hello"},
        "rejected": {"from": "gpt", "value": "Go away"},
    },
    "chat": {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_conversations_are_recognised_and_read_as_chat(name):
    reader = recognise([EXAMPLES[name]])
    assert reader.layout.name == name
    assert reader.pair(EXAMPLES[name]) == read_pair(EXAMPLES[name]) == Pair([USER], "Hello", "Go away")


@pytest.mark.parametrize("prompt", ["Hi", [USER]])
@pytest.mark.parametrize("chosen", ["Hello", [ANSWER], [USER, ANSWER]])
def test_trl_rows_take_text_and_messages(prompt, chosen):
    row = {"prompt": prompt, "chosen": chosen, "rejected": "Go away"}
    reader = recognise([row])
    assert reader.layout.name == "trl"
    assert reader.pair(row) == Pair(prompt, "Hello", "Go away")


@pytest.mark.parametrize(
    ("safer", "chosen"),
    [(0, "Hello"), (1, "Go away"), ("1", "Go away"), (0.0, "Hello"), ("1.0", "Go away"), (True, "Go away")],
)
def test_pku_rows_choose_the_safer_response_even_if_the_other_is_called_better(safer, chosen):
    row = {
        "prompt": "Hi",
        "response_0": "Hello",
        "response_1": "Go away",
        "safer_response_id": safer,
        "better_response_id": 0,
    }
    reader = recognise([row])
    assert reader.layout.name == "pku"
    assert reader.pair(row).chosen == chosen


def test_a_prompt_that_is_a_transcript_becomes_its_turns():
    row = {"prompt": "Human: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:", "chosen": "Bye", "rejected": "No"}
    pair = read_pair(row)
    assert pair.prompt == [USER, ANSWER, {"role": "user", "content": "Bye"}]
    assert (pair.chosen, pair.rejected) == ("Bye", "No")


def test_a_transcript_keeps_paragraphs_and_names_inside_a_turn():
    said = transcript("\n\nHuman: one\n\ntwo Human: three\n\nAssistant: four\n\nfive")
    assert said == [
        {"role": "user", "content": "one\n\ntwo Human: three"},
        {"role": "assistant", "content": "four\n\nfive"},
    ]


def test_columns_of_another_name_are_found_by_renaming():
    row = {"question": "Hi", "good": "Hello", "bad": "Go away"}
    rename = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert recognise([row], rename).pair(row) == Pair("Hi", "Hello", "Go away")
    with pytest.raises(DataError, match="no layout has a column 'promt'"):
        recognise([row], {"promt": "question"})


def test_what_is_not_recognised_names_its_columns_and_what_is_known():
    rows = [{"question": "a", "answer": "b"}]
    with pytest.raises(DataError, match=r"columns are: answer, question(.|\n)*pku") as alone:
        recognise(rows)
    assert "--" not in str(alone.value), "options that not every caller has"
    with pytest.raises(DataError, match=r"pku(.|\n)*\nName one with --layout$"):
        recognise(rows, advice="Name one with --layout")
    with pytest.raises(DataError, match="there is no layout 'other': auto, hh"):
        recognise([], name="other")


def test_one_odd_row_does_not_change_what_is_recognised():
    odd = {"prompt": "Human: x\n\nAssistant:", "chosen": "a", "rejected": "b"}
    assert recognise([odd, *[EXAMPLES["chat"]] * 4]).layout.name == "chat"


SYSTEM, MORE = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "And now?"}
TOOL = {"role": "tool", "content": "21 C"}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        # the conversation repeats the prompt, with more before it, after it, or both
        ({"prompt": "Hi", "chosen": [USER, OTHER, MORE, ANSWER]}, [USER, OTHER, MORE]),
        ({"prompt": "Hi", "chosen": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER]),
        ({"prompt": " Hi\n", "chosen": [SYSTEM, USER, OTHER, MORE, ANSWER]}, [SYSTEM, USER, OTHER, MORE]),
        ({"prompt": [USER, OTHER, MORE], "chosen": [USER, OTHER, MORE, ANSWER]}, [USER, OTHER, MORE]),
        ({"prompt": "", "chosen": [USER, ANSWER]}, [USER]),
        # or goes on from it
        ({"prompt": [USER], "chosen": [OTHER, TOOL, ANSWER]}, [USER, OTHER, TOOL]),
        ({"prompt": "Hi", "chosen": [OTHER, MORE, ANSWER]}, [USER, OTHER, MORE]),
        ({"prompt": [SYSTEM, USER], "chosen": [USER, ANSWER]}, [SYSTEM, USER]),
        ({"prompt": [SYSTEM, USER], "chosen": [USER, OTHER, MORE, ANSWER]}, [SYSTEM, USER, OTHER, MORE]),
        ({"prompt": [USER, OTHER], "chosen": [MORE, ANSWER]}, [USER, OTHER, MORE]),
        ({"prompt": "Hi", "chosen": [OTHER, USER, ANSWER]}, [USER, OTHER, USER]),  # who says the same thing twice
        # columns of their own
        ({"system": "Be brief.", "prompt": "Hi", "chosen": "Hello"}, [SYSTEM, USER]),
        ({"system": "Be brief.", "prompt": [SYSTEM, USER], "chosen": "Hello"}, [SYSTEM, USER]),
        ({"system": "Be brief.", "chosen": [USER, ANSWER]}, [SYSTEM, USER]),
        ({"system": "", "prompt": "Hi", "chosen": "Hello"}, "Hi"),
        ({"system": "Be brief.", "question": "Hi", "chosen": "Hello"}, [SYSTEM, USER]),
        ({"messages": [USER, OTHER, MORE], "chosen": "Hello"}, [USER, OTHER, MORE]),
        ({"instruction": "Add", "input": "1 and 2", "chosen": "Hello"}, "Add\n1 and 2"),
        ({"instruction": "Add", "input": "", "history": [], "chosen": "Hello"}, "Add"),
        (
            {"instruction": "And now?", "history": [["Hi", "Go away"]], "system": "Be brief.", "chosen": "Hello"},
            [SYSTEM, USER, OTHER, MORE],
        ),
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "observation", "value": "21 C"}],
                "system": "Be brief.", "tools": "[]", "chosen": {"from": "gpt", "value": "Hello"},
            },
            [SYSTEM, USER, TOOL],
        ),
        ({"system": "Be brief.", "chosen": "Human: Hi\r\n\r\nAssistant: Hello"}, [SYSTEM, USER]),
        ({"prompt": "Human: Hi\n\nAssistant:", "chosen": "Human: Hi\n\nAssistant: Hello"}, [USER]),
    ],
)  # fmt: skip
def test_the_whole_context_of_a_row_is_its_prompt(row, prompt):
    row = {**row, "rejected": row["chosen"]}
    assert read_pair(row) == recognise([row]).pair(row) == Pair(prompt, "Hello", "Hello")


@pytest.mark.parametrize(
    ("layout", "row", "said"),
    [
        ("trl", {"prompt": "Hi", "chosen": "a"}, "'rejected' is missing; the row has chosen, prompt"),
        ("trl", {"prompt": "Hi", "chosen": "a", "rejected": None}, "'rejected' is missing"),
        ("trl", {"prompt": "Hi", "chosen": 3, "rejected": "b"}, "'chosen' must be text, or chat messages"),
        ("trl", {"prompt": [{"content": "a"}], "chosen": "a", "rejected": "b"}, "'prompt' must be a list of .role"),
        ("trl", {"prompt": [], "chosen": "a", "rejected": "b"}, "'prompt' must be a list .* not empty"),
        ("trl", {"prompt": [USER, ANSWER], "chosen": "a", "rejected": "b"}, "ends with the assistant"),
        ("trl", {"prompt": "Hi", "chosen": [USER], "rejected": "b"}, "'chosen' must end with the assistant's"),
        ("trl", {"prompt": "Hi", "chosen": "\ud800", "rejected": "b"}, "not Unicode"),
        ("trl", {"prompt": "Ho", "chosen": [USER, ANSWER], "rejected": "b"}, "neither repeats the prompt nor goes on"),
        ("trl", {"prompt": "Hi", "chosen": [OTHER, MORE, ANSWER], "rejected": "b"}, "answer different prompts"),
        ("trl", {"prompt": "Hi", "chosen": "a", "rejected": "b", "tools": [{"name": "f"}]}, "'tools' is context which"),
        ("trl", {"prompt": "Hi", "chosen": "a", "rejected": "b", "images": ["a.png"]}, "'images' is context which"),
        (
            "trl",
            {"prompt": "Hi", "chosen": [{"role": "assistant", "content": "", "thinking": "x"}], "rejected": "b"},
            "'chosen', message 1 has 'thinking' and no text",
        ),
        ("trl", {"prompt": "Hi", "chosen": "a", "rejected": "b", "system": ["x"]}, "'system' must be text"),
        ("trl", {"prompt": [SYSTEM, USER], "chosen": "a", "rejected": "b", "system": "x"}, "the system turn .* differ"),
        ("chat", {"chosen": [USER, ANSWER], "rejected": [{**USER, "content": "Ho"}, OTHER]}, "different prompts"),
        ("chat", {"chosen": [ANSWER], "rejected": [OTHER]}, "nothing before"),
        ("hh", {"chosen": "Hello", "rejected": "Human: a\n\nAssistant: b"}, "'chosen': a transcript must begin with"),
        ("pku", {"prompt": "Hi", "response_0": "a", "response_1": "b", "safer_response_id": 2}, "must be 0 or 1"),
        ("sharegpt", {"conversations": [], "chosen": {}, "rejected": {}}, "must be a list"),
        (
            "sharegpt",
            {"conversations": [{"from": "cook", "value": "a"}], "chosen": "a", "rejected": "b"},
            "'conversations', message 1 has the role 'cook', which is none of system, developer, user",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "function_call", "value": "f()"}], "chosen": "a", "rejected": "b"},
            "'conversations', message 1 calls a tool",
        ),
        ("alpaca", {"instruction": "a", "history": "b", "chosen": "a", "rejected": "b"}, "'history' must be a list"),
    ],
)
def test_a_row_that_does_not_fit_says_which_column(layout, row, said):
    with pytest.raises(DataError, match=said):
        PairReader(LAYOUTS[layout]).pair(row)


def test_a_column_can_be_left_unread_on_purpose():
    row = {"prompt": "Hi", "chosen": "a", "rejected": "b", "tools": [{"name": "f"}]}
    assert recognise([row], {"tools": ""}).pair(row) == Pair("Hi", "a", "b")


def test_columns_that_look_like_a_part_of_the_pair_and_are_not_read_are_told():
    row = {"prompt": "Hi", "chosen": "a", "rejected": "b", "input": "x", "history": [], "messages": None, "id": 3}
    (told,) = recognise([row]).notes([row])
    assert "not read: the columns 'input' (layout trl)" in told
    row = {"question": "Hi", "chosen": "a", "rejected": "b", "system_prompt": "x"}
    assert "'system_prompt'" in recognise([row]).notes([row])[0]
    assert recognise([row], {"system": "system_prompt", "prompt": "question"}).notes([row]) == []


@pytest.mark.parametrize("tools", [None, [], "[]", " null", ""])
def test_no_tools_are_none_however_they_are_written(tools):
    assert read_pair({"prompt": "Hi", "chosen": "a", "rejected": "b", "tools": tools}) == Pair("Hi", "a", "b")


def test_a_history_may_be_messages():
    row = {"instruction": "Ho", "history": [USER, ANSWER], "chosen": "a", "rejected": "b"}
    assert read_pair(row).prompt == [USER, ANSWER, {"role": "user", "content": "Ho"}]


def test_a_prompt_may_be_the_last_question_of_the_conversation():
    row = {"prompt": MORE["content"], "chosen": [USER, OTHER, MORE, ANSWER], "rejected": [USER, OTHER, MORE, OTHER]}
    assert read_pair(row).prompt == [USER, OTHER, MORE]


def test_conversations_that_are_stored_as_json_text_are_named():
    row = {"chosen": json.dumps([USER, ANSWER]), "rejected": json.dumps([USER, OTHER])}
    with pytest.raises(DataError, match="'chosen' holds messages as JSON text"):
        read_pair(row)
    with pytest.raises(DataError, match="as JSON text in 'chosen', 'rejected'"):
        recognise([row])


def test_messages_that_are_stored_as_json_text_are_told_and_read_if_asked():
    row = {"prompt": "Hi", "chosen": json.dumps([USER, ANSWER]), "rejected": json.dumps([USER, OTHER])}
    plain = recognise([row])
    assert plain.pair(row).chosen == row["chosen"]
    (told,) = plain.notes([row])
    assert "'chosen', 'rejected'" in told
    assert "--parse-json" in told
    parsing = recognise([row], parse_json=True)
    assert parsing.pair(row) == Pair("Hi", "Hello", "Go away")
    assert parsing.notes([row]) == []
    text = {"prompt": "[laughs]", "chosen": "{}", "rejected": '["a"]'}
    assert parsing.pair(text) == Pair("[laughs]", "{}", '["a"]')


@pytest.mark.parametrize(
    ("value", "number"),
    [(0, 0), (1.0, 1), ("0.0", 0), (" 1 ", 1), (True, 1), ("False", 0), (2, None), ("x", None), (None, None)],
)
def test_a_label_is_zero_or_one_however_it_is_written(value, number):
    assert which(value) == number


def test_a_prompt_is_read_without_answers():
    assert read_prompt({"instruction": "a", "input": "b", "system": "Be brief."}) == [
        SYSTEM,
        {"role": "user", "content": "a\nb"},
    ]
    assert read_prompt({"prompt": "Human: Hi\n\nAssistant:"}) == [USER]
    assert read_prompt({"messages": [USER]}) == [USER]
    with pytest.raises(DataError, match="'prompt' is missing; the row has x"):
        read_prompt({"x": 1})


def test_a_sample_of_a_trainer_has_its_whole_context():
    assert read_item("Hi", "Hello") == ("Hi", "Hello")
    assert read_item([USER], [OTHER, TOOL, ANSWER]) == ([USER, OTHER, TOOL], "Hello")
    assert read_item([], [USER, ANSWER]) == ([USER], "Hello")
    with pytest.raises(DataError, match="nothing before"):
        read_item(None, "Hello")
