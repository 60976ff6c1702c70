"""Texts are tokenised as the service tokenises them: what is trained on is what was scored."""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import inward
from inward.backbones.tokenizer import _render
from inward.prompts import Prompts
from inward_trainer.base_model import eos_ids
from inward_trainer.errors import DataError
from inward_trainer.feed import fitting
from inward_trainer.pairs import ScoredPair
from inward_trainer.tokens import Tokeniser
from support.tiny_tokenizer import of_transformers as tokenizer

TEXT = st.text(alphabet=st.characters(codec="utf-8"), max_size=30)
TOKENIZERS = {
    "chat": (tokenizer(), None),
    "chat, no BOS": (tokenizer(bos=False), None),
    "no chat template": (tokenizer(chat=False), None),
    "format": (tokenizer(), "Q: {prompt}\nA: {response}"),
    "demonstration": (AutoTokenizer.from_pretrained(Path(inward.__file__).parent / "models/toy" / "backbone"), None),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(prompt=TEXT, chosen=TEXT, rejected=TEXT)
def test_ids_are_the_services(kind, prompt, chosen, rejected):
    tok, format = TOKENIZERS[kind]
    group = (
        Prompts(tok, max_tokens=4096, format=format).group(prompt, (chosen, rejected))
        if prompt or (chosen and rejected)
        else None
    )
    if group is None:
        return
    tokeniser = Tokeniser(tok, format)
    ours = tokeniser(ScoredPair("0", prompt, chosen, rejected, finished=(False, False)))
    assert tokeniser.template == Prompts(tok, max_tokens=4096, format=format).template
    assert tuple(ours.prompt_ids) == group.group.prompt_ids
    assert (tuple(ours.chosen_ids), tuple(ours.rejected_ids)) == group.group.responses_ids


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_of_conversations_are_the_services(kind):
    tok, format = TOKENIZERS[kind]
    turns = [("system", "Be brief."), ("user", "Birds?"), ("assistant", "Seven."), ("user", "Boats?")]
    prompt = [{"role": role, "content": content} for role, content in turns]
    group = Prompts(tok, max_tokens=4096, format=format).group(prompt, (" The harbour.", " No.")).group
    ours = Tokeniser(tok, format)(ScoredPair("0", prompt, " The harbour.", " No.", finished=(False, False)))
    assert (tuple(ours.prompt_ids), tuple(ours.chosen_ids), tuple(ours.rejected_ids)) == (
        group.prompt_ids,
        *group.responses_ids,
    )


def test_an_answer_that_ended_by_itself_ends_with_eos_and_one_that_was_cut_does_not():
    ours = Tokeniser(tokenizer())(ScoredPair("0", "Birds?", " Seven.", " Five", finished=(True, False)))
    assert ours.chosen_ids[-1] == 1
    assert 1 not in ours.rejected_ids


def test_what_ends_an_answer_is_what_the_chat_template_writes_there():
    """Of several EOS ids a chat model has learnt that one; a text without a template ends with the tokenizer's."""
    tok = tokenizer()
    user = tok.convert_tokens_to_ids("<|user|>")
    assert Tokeniser(tok, eos_ids=(user, 1)).eos_id == 1
    assert Tokeniser(tok, "Q: {prompt}\nA: {response}", (user, 1)).eos_id == user
    tok.chat_template = tok.chat_template.replace("<|end|>", "<|user|>")
    assert Tokeniser(tok, eos_ids=(1, user)).eos_id == user
    assert Tokeniser(tok, eos_ids=(1,)).eos_id == 1, "a terminator that ends no generation is none"
    with pytest.raises(DataError, match="no end-of-sequence token"):
        tok.eos_token = None
        Tokeniser(tok)


def test_every_eos_that_the_model_names_counts(tmp_path):
    tok = tokenizer()
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    assert eos_ids(tmp_path, tok) == (1,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 1]}')
    assert eos_ids(tmp_path, tok) == (1, 4)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("Birds?", " a<|end|>b", " a b"),
        ("Is <|end|> or <s> the end?", "Yes.", "<|end|>"),
        ([{"role": "user", "content": "<|im_end|>\n<|end|>"}], " <|user|>", "<|endoftext|></s>"),
    ],
)
def test_control_tokens_that_a_text_spells_are_text_as_in_the_service(kind, prompt, chosen, rejected):
    tok, format = TOKENIZERS[kind]
    group = Prompts(tok, max_tokens=4096, format=format).group(prompt, (chosen, rejected)).group
    ours = Tokeniser(tok, format)(ScoredPair("0", prompt, chosen, rejected, finished=(False, False)))
    assert (tuple(ours.prompt_ids), tuple(ours.chosen_ids), tuple(ours.rejected_ids)) == (
        group.prompt_ids,
        *group.responses_ids,
    )
    assert not set(tok.all_special_ids) & {*ours.chosen_ids, *ours.rejected_ids}


def test_a_template_that_prints_the_date_prints_the_services():
    tok = tokenizer()
    tok.chat_template = "{{ strftime_now('%d %b %Y') }}" + tok.chat_template
    assert Tokeniser(tok).template == Prompts(tok, max_tokens=4096).template
    as_served = copy.copy(tok)
    as_served.apply_chat_template = partial(_render, as_served)  # as load_tokenizer gives it
    assert Tokeniser(tok).render("Birds?") == Prompts(as_served, max_tokens=4096).render("Birds?")


def test_what_the_policy_drew_is_trained_on_as_it_wrote_it():
    pair = ScoredPair(
        "0", "Birds?", " Seven.", " Five", finished=(True, False), chosen_ids=(69, 70), rejected_ids=(71,)
    )
    ours = Tokeniser(tokenizer())(pair)
    assert (ours.chosen_ids, ours.rejected_ids) == ([69, 70, 1], [71])


def test_a_format_without_its_fields_is_refused():
    with pytest.raises(DataError, match="must end with"):
        Tokeniser(tokenizer(), "{prompt}")


def test_a_turn_that_the_chat_template_refuses_or_leaves_out_is_named():
    tok = tokenizer()
    pair = ScoredPair("0", [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "Hi"}], "a", "b")
    tok.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="leaves out a turn of the role 'developer'"):
        Tokeniser(tok)(pair)
    tok.chat_template = "{% if messages[1] %}{{ raise_exception('no') }}{% endif %}{{ messages[0]['content'] }}"
    with pytest.raises(DataError, match="refuses the conversation: no"):
        Tokeniser(tok)(pair)
    assert fitting([pair, replace(pair, id="1", prompt="Hi")], Tokeniser(tok), 1000)[0].id == "1"
    tok.chat_template = "{{ messages[0]['role'] }}"
    with pytest.raises(DataError, match="--template"):
        Tokeniser(tok)
