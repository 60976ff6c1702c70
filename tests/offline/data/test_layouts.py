import pytest

from inward.errors import DataError
from inward.offline.data.layouts import LAYOUTS, Pair, read, recognise, transcript

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
    layout = recognise([EXAMPLES[name]], {})
    assert layout.name == name
    assert read(layout, EXAMPLES[name]) == Pair([USER], "Hello", "Go away")


@pytest.mark.parametrize("prompt", ["Hi", [USER]])
@pytest.mark.parametrize("chosen", ["Hello", [ANSWER], [USER, ANSWER]])
def test_trl_rows_take_text_and_messages(prompt, chosen):
    row = {"prompt": prompt, "chosen": chosen, "rejected": "Go away"}
    layout = recognise([row], {})
    assert layout.name == "trl"
    assert read(layout, row) == Pair(prompt, "Hello", "Go away")


@pytest.mark.parametrize(("safer", "chosen"), [(0, "Hello"), (1, "Go away"), ("1", "Go away")])
def test_pku_rows_choose_the_safer_response_even_if_the_other_is_called_better(safer, chosen):
    row = {
        "prompt": "Hi",
        "response_0": "Hello",
        "response_1": "Go away",
        "safer_response_id": safer,
        "better_response_id": 0,
    }
    layout = recognise([row], {})
    assert layout.name == "pku"
    assert read(layout, row).chosen == chosen


def test_a_prompt_that_is_a_transcript_becomes_its_turns():
    row = {"prompt": "Human: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:", "chosen": "Bye", "rejected": "No"}
    pair = read(recognise([row], {}), row)
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
    assert read(recognise([row], rename), row, rename) == Pair("Hi", "Hello", "Go away")


def test_what_is_not_recognised_names_its_columns_and_what_is_known():
    with pytest.raises(DataError, match=r"columns are: answer, question(.|\n)*pku(.|\n)*--columns"):
        recognise([{"question": "a", "answer": "b"}], {})


def test_one_odd_row_does_not_change_what_is_recognised():
    assert (
        recognise(
            [{"prompt": "Human: x\n\nAssistant:", "chosen": "a", "rejected": "b"}, *[{**EXAMPLES["chat"]}] * 4], {}
        ).name
        == "chat"
    )


@pytest.mark.parametrize(
    ("layout", "row", "said"),
    [
        ("trl", {"prompt": "Hi", "chosen": "a"}, "'rejected' is missing; the row has chosen, prompt"),
        ("trl", {"prompt": "Hi", "chosen": "a", "rejected": None}, "'rejected' is missing"),
        ("trl", {"prompt": "Hi", "chosen": 3, "rejected": "b"}, "'chosen' must be text"),
        ("trl", {"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}, "'prompt' must be a list"),
        ("trl", {"prompt": "Hi", "chosen": [USER], "rejected": "b"}, "'chosen' must end with the assistant's"),
        ("trl", {"prompt": "Hi", "chosen": "\ud800", "rejected": "b"}, "not Unicode"),
        ("chat", {"chosen": [USER, ANSWER], "rejected": [{**USER, "content": "Ho"}, OTHER]}, "different prompts"),
        ("chat", {"chosen": [ANSWER], "rejected": [OTHER]}, "nothing before"),
        ("hh", {"chosen": "Hello", "rejected": "Human: a\n\nAssistant: b"}, "must begin with"),
        ("pku", {"prompt": "Hi", "response_0": "a", "response_1": "b", "safer_response_id": 2}, "must be 0 or 1"),
        ("sharegpt", {"conversations": [], "chosen": {}, "rejected": {}}, "must be a list"),
    ],
)
def test_a_row_that_does_not_fit_says_which_column(layout, row, said):
    with pytest.raises(DataError, match=said):
        read(LAYOUTS[layout], row)
