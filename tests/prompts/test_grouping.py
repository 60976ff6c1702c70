import asyncio
from datetime import timedelta
from pathlib import Path

import pytest

import inward
from inward.backbones.tokenizer import load_tokenizer
from inward.errors import InvalidField, SetupError, TooLarge
from inward.prompts import DATE, Prompts, Texts
from support.tiny_tokenizer import tokenizer

MODELS = Path(inward.__file__).parent / "models"
CHAT = tokenizer()
PLAIN = tokenizer(chat=False)


def prompts(tok=CHAT, **options):
    return Prompts(tok, **{"max_tokens": 200, **options})


def test_a_prompt_string_is_one_user_turn():
    text = prompts().render("How tall is it?")
    assert text == CHAT.apply_chat_template(
        [{"role": "user", "content": "How tall is it?"}], tokenize=False, add_generation_prompt=True
    )


def test_prompt_and_response_have_the_tokens_of_the_whole_text():
    group = prompts().group("How tall?", ["About 115 metres.", "I do not know."]).group
    for response, ids in zip(["About 115 metres.", "I do not know."], group.responses_ids, strict=True):
        whole = CHAT(prompts().render("How tall?") + response, add_special_tokens=False)["input_ids"]
        assert [*group.prompt_ids, *ids] == whole


@pytest.mark.parametrize("format", ["{prompt}{response}", "<s>{prompt}{response}", "<s><s>{prompt}{response}"])
def test_there_is_exactly_one_bos_whoever_writes_it(format):
    ids = prompts(PLAIN, format=format).group("a b", ["c"]).group.prompt_ids
    assert ids.count(0) == 1
    assert ids[0] == 0


def test_chat_templates_that_write_a_bos_are_not_given_a_second():
    assert prompts().group("a", ["b"]).group.prompt_ids.count(0) == 1


def test_a_model_without_bos_gets_none():
    tok = tokenizer(chat=False, bos=False)
    assert (
        list(prompts(tok, format="{prompt}{response}").group("harbour", ["x"]).group.prompt_ids)
        == tok("harbour")["input_ids"]
    )


def test_a_boundary_inside_a_token_does_not_change_with_the_neighbours():
    p = prompts(PLAIN, format="{prompt}{response}")
    alone = p.group("the har", ["bour was"]).group
    together = p.group("the har", ["bour was", " lay still", ""]).group
    assert together.prompt_ids == alone.prompt_ids
    assert together.responses_ids[0] == alone.responses_ids[0]
    assert PLAIN.decode([*alone.prompt_ids, *alone.responses_ids[0]], skip_special_tokens=True) == "the harbour was"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "robot", "content": "x"}], "messages.0.role"),
        ([{"role": "user", "content": 3}], "messages.0.content"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "messages.1.role"),
        ([{"role": "user", "content": "\ud800"}], "messages.0.content"),
    ],
)
def test_illegal_conversations_are_refused_by_field(messages, param):
    with pytest.raises(InvalidField) as caught:
        prompts().group(messages, ["x"])
    assert caught.value.param == param


def test_lone_surrogates_in_a_response_are_refused():
    with pytest.raises(InvalidField, match="surrogate") as caught:
        prompts().group("x", ["fine", "a\udfff"])
    assert caught.value.param == "responses.1"


def test_an_empty_response_is_legal_but_nothing_at_all_is_not():
    assert prompts().group("x", [""]).group.responses_ids == ((),)
    with pytest.raises(InvalidField, match="no token"):
        prompts(tokenizer(chat=False, bos=False), format="{prompt}{response}").group("", [""])


@pytest.mark.parametrize(
    ("prompt", "responses", "param"),
    [("T", [""], "responses.0"), ("", ["a harbour", "T"], "responses.1")],
)
def test_a_single_token_is_judged_after_a_bos_only(prompt, responses, param):
    tok = tokenizer(chat=False, bos=False)
    with pytest.raises(InvalidField, match="nothing before it") as caught:
        prompts(tok).group(prompt, responses, rendered=True)
    assert caught.value.param == param
    assert prompts(tok).group("T", [], rendered=True).group.prompt_ids  # to go on from
    assert len(prompts(PLAIN).group("T", [""], rendered=True).group.prompt_ids) == 2


def test_a_bos_alone_is_nothing_to_judge():
    with pytest.raises(InvalidField, match="no token"):
        prompts(PLAIN).group("", [""], rendered=True)


@pytest.mark.parametrize("format", ["{response}", "{prompt}", "{prompt}{response}."])
def test_a_format_that_lacks_a_field_or_goes_on_after_the_response_is_refused(format):
    with pytest.raises(SetupError, match="template"):
        prompts(PLAIN, format=format)


def test_templates_have_different_names():
    assert prompts().template.startswith("chat:")
    assert prompts(PLAIN).template != prompts(PLAIN, format="{prompt}{response}").template


async def test_many_texts_come_back_in_order_with_errors_in_place():
    p = prompts()
    results = await p.group_many(
        [Texts("a", ("b",)), Texts("a", ("\ud800",)), Texts("harbour " * 5000, ("c",)), Texts("a", ("d",))]
    )
    assert results[0] == p.group("a", ["b"])
    assert isinstance(results[1], InvalidField)
    assert isinstance(results[2], TooLarge)
    assert results[3] == p.group("a", ["d"])
    await asyncio.sleep(0)


def test_a_rendered_conversation_whose_bos_was_taken_off_has_one_again():
    prompts = Prompts(tokenizer(), max_tokens=1000)
    rendered = prompts.render("Hi.")
    assert prompts.group(rendered.removeprefix("<s>"), ["Yes?"], rendered=True) == prompts.group("Hi.", ["Yes?"])


def test_text_without_a_place_where_an_answer_begins_is_all_prompt():
    assert Prompts(tokenizer(), max_tokens=1000).turns.split("just text") == ("just text", "")
    assert Prompts(tokenizer(chat=False), max_tokens=1000).turns.split("Human: a\n\nAssistant: b") == (
        "Human: a\n\nAssistant: b",
        "",
    )


DATED = "{{ strftime_now('%d %B %Y, %H:%M') }} {% for m in messages %}{{ m['content'] }}{% endfor %}"


def test_a_template_that_prints_the_date_prints_the_same_one_every_day_and_says_so(caplog):
    tok = tokenizer()
    tok.chat_template = DATED
    with caplog.at_level("INFO"):
        dated = prompts(tok)
    assert dated.render("Hi.") == "26 July 2024, 00:00 Hi."
    assert dated.template.endswith("@2024-07-26")
    assert [r.fields["date"] for r in caplog.records if r.message == "template_date_fixed"] == ["2024-07-26"]
    assert "@" not in prompts().template


def test_the_date_is_that_of_a_head_fitted_earlier(monkeypatch):
    """The template's name has it, so that a head that was fitted with another date is not taken for this one's."""
    tok = tokenizer()
    tok.chat_template = DATED
    before = prompts(tok).template
    monkeypatch.setattr("inward.prompts.chat_template.DATE", DATE + timedelta(days=1))
    assert prompts(tok).template != before


@pytest.mark.parametrize("folder", ["toy/backbone", "smollm2/tokenizer"])
@pytest.mark.parametrize(
    "text", ["", "The harbour was quiet.", "  two  spaces\n\tand", "naïve 日本語 🙂👩‍👩‍👧!", " leading", "x" * 50]
)
def test_the_pieces_of_a_response_are_its_text_and_no_character_is_torn(folder, text):
    told = prompts(load_tokenizer(MODELS / folder))
    ids = told.group("a", [text]).group.responses_ids[0]
    pieces = told.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_response_that_ends_within_a_character_has_its_rest_as_it_is():
    told = prompts(load_tokenizer(MODELS / "smollm2/tokenizer"))
    ids = told.group("a", ["so 👩‍👩‍👧"]).group.responses_ids[0][:-1]
    assert "".join(told.pieces(ids)).startswith("so ")
