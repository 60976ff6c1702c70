"""Texts are tokenised as the service tokenises them: what is trained on is what was scored."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import inward
from inward.prompts import Prompts
from inward_trainer.errors import DataError
from inward_trainer.pairs import ScoredPair
from inward_trainer.tokens import Tokeniser
from support.tiny_tokenizer import tokenizer

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
    ours = Tokeniser(tok, format)(ScoredPair("0", prompt, chosen, rejected, finished=(False, False)))
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


def test_a_format_without_its_fields_is_refused():
    with pytest.raises(DataError, match="must end with"):
        Tokeniser(tokenizer(), "{prompt}")
