"""Texts that trainers rendered, scored as their prompt and response are: the templates of well-known families."""

from functools import cache
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inward.errors import InvalidField
from inward.prompts import Prompts
from support.chat_templates import FAMILIES, end_ids_of, tokenizer_of

QUESTION = {"role": "user", "content": "How tall is it?"}
ONE = [QUESTION]
SEVERAL = [QUESTION, {"role": "assistant", "content": "115 metres."}, {"role": "user", "content": "And the harbour?"}]
ANSWERS = ["The harbour was quiet.", "Two lines:\n\n- one\n- two\n", "I would rather not <help> [with] that", "x"]


@cache
def prompts_of(family, *, ends=True):
    return Prompts(tokenizer_of(family), max_tokens=1000, end_ids=end_ids_of(family) if ends else ())


def chats(family):
    yield ONE
    yield SEVERAL
    if FAMILIES[family].system:
        yield [{"role": "system", "content": "Be kind."}, QUESTION]


def native(prompts, chat, answer):
    return prompts.group(chat, [answer])


def scored(prompts, text, prompt=""):
    begun, response = prompts.turns.split(text, prompt)
    return prompts.group(begun, [response], rendered=True)


def endings(family):
    """Whatever may stand after an answer."""
    known = FAMILIES[family]
    pad = known.pad or known.eos
    for end in (known.eos, *known.ends):
        yield from (end, end + "\n", end + 3 * pad, end + "\n" + known.eos + 2 * pad)
    yield ""
    yield 4 * pad


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_generated_scores_as_its_prompt_and_response_however_it_ends(family):
    prompts = prompts_of(family)
    pad = FAMILIES[family].pad or FAMILIES[family].eos
    for chat, answer, ending, padding in product(chats(family), ANSWERS, endings(family), ("", 5 * pad)):
        rendered = prompts.render(chat)
        wanted = native(prompts, chat, answer)
        assert scored(prompts, padding + rendered + answer + ending) == wanted
        assert scored(prompts, padding + rendered + answer + ending, rendered) == wanted
        assert scored(prompts, padding + rendered + answer + ending, padding + rendered) == wanted


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ends", [True, False], ids=["ids known", "ids of the tokenizer"])
def test_a_whole_conversation_scores_as_its_prompt_and_response(family, ends):
    prompts = prompts_of(family, ends=ends)
    for chat in chats(family):
        whole = [*chat, {"role": "assistant", "content": "The harbour was quiet."}]
        text = prompts._chat(whole, answer_next=False)
        wanted = native(prompts, chat, "The harbour was quiet.")
        unasked = prompts._chat(chat, answer_next=False)
        for form in (text, text.rstrip(), text.rstrip() + 3 * (FAMILIES[family].pad or FAMILIES[family].eos)):
            assert scored(prompts, form) == wanted
            assert scored(prompts, form, prompts.render(chat)) == wanted
            assert scored(prompts, form, unasked.removesuffix(FAMILIES[family].eos)) == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_answer_is_one_whatever_ends_it(family):
    prompts = prompts_of(family)
    for chat in chats(family):
        rendered = prompts.render(chat)
        for form in (rendered, rendered.rstrip(), rendered + FAMILIES[family].eos + "\n"):
            for prompt in ("", rendered):
                assert scored(prompts, form, prompt) == native(prompts, chat, "")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bos_that_was_taken_off_or_doubled_changes_nothing(family):
    prompts = prompts_of(family)
    bos = FAMILIES[family].bos
    if bos is None or family == "smollm2":  # whose BOS is what begins a turn
        return
    text = prompts.render(ONE) + "Yes."
    for form in (text.removeprefix(bos), bos + text, bos + " " + text.removeprefix(bos)):
        assert scored(prompts, form) == native(prompts, ONE, "Yes.")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rendered_prompt_is_known_with_and_without_its_generation_prompt(family):
    prompts = prompts_of(family)
    for chat in chats(family):
        rendered, unasked = prompts.render(chat), prompts._chat(chat, answer_next=False)
        for form in (rendered, rendered.rstrip(), unasked, unasked.rstrip()):
            assert prompts.turns.is_rendered(form)
            if (
                form != unasked or family != "thinking"
            ):  # where nothing ends a turn, nothing says that an answer is next
                assert prompts.turns.complete(form) == rendered
    for text in (
        "How tall is it?",
        "",
        "Explain <think> and [brackets].",
        "user\nHow tall?\nassistant\n",
        "[TOTAL] 5 <b>",
    ):
        assert not prompts.turns.is_rendered(text)


def test_a_prompt_with_another_generation_prompt_is_known_and_stays_as_it_is():
    prompts = prompts_of("qwen-2.5")
    prompt = prompts.render(ONE) + "<think>\n\n</think>\n\n"
    assert prompts.turns.is_rendered(prompt)
    assert prompts.turns.split(prompt + "Yes.<|im_end|>", prompt) == (prompt, "Yes.")


def test_the_empty_thought_that_a_template_writes_before_an_answer_is_no_part_of_it():
    prompts = prompts_of("qwen-3")
    text = prompts.render(ONE) + "<think>\n\n</think>\n\nYes.<|im_end|>\n"
    assert prompts.turns.split(text) == (prompts.render(ONE), "Yes.")


def test_a_thought_that_was_generated_stays_with_the_answer():
    prompts = prompts_of("thinking")
    text = prompts.render(ONE) + "it is tall</think>115 metres.<|end|>"
    assert prompts.turns.split(text) == (prompts.render(ONE), "it is tall</think>115 metres.")


def test_a_response_keeps_the_white_space_that_it_ends_in_itself():
    turns = prompts_of("qwen-2.5").turns
    for ending in ("", "<|im_end|>\n"):
        assert turns.strip("line\n" + ending) == "line\n"


def test_a_template_that_can_not_be_asked_leaves_texts_as_they_are_but_for_their_ends():
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    turns = Prompts(tokenizer, max_tokens=100).turns
    assert turns.split("<|im_start|>user\nHi</s><pad>") == ("<|im_start|>user\nHi", "")
    assert not turns.is_rendered("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_marks_in_any_order_are_split_into_what_can_be_scored(family, data):
    prompts, known = prompts_of(family), FAMILIES[family]
    marks = [
        known.eos,
        known.bos or "",
        known.pad or "",
        *known.ends,
        *known.control,
        "<think>",
        "[INST]",
        "\n",
        " ",
        "a b",
    ]
    pieces = st.lists(st.sampled_from(marks), max_size=12).map("".join)
    text, prompt = data.draw(pieces), data.draw(pieces)
    for known_prompt in ("", prompt):
        begun, response = prompts.turns.split(known_prompt + text, known_prompt)
        assert prompts.turns.strip(response) == response
        try:
            group = prompts.group(begun, [response], rendered=True).group
        except InvalidField:  # nothing is left of it, or a single token
            said = (begun + response).replace(known.bos or "\0", "")
            (left,) = prompts.tokenizer([said], add_special_tokens=False)["input_ids"]
            assert len(left) < 2
        else:
            assert len(group.prompt_ids) + len(group.responses_ids[0]) > 1
