"""Control tokens that somebody spells out are text, unless the text came rendered."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, trainers

from inward.prompts import Prompts
from support.chat_templates import FAMILIES, tokenizer_of
from support.tiny_tokenizer import TEXTS, saved, tokenizer


def specials(prompts, ids):
    known = {i for i, token in prompts.tokenizer.added_tokens_decoder.items() if token.special}
    return [i for i in ids if i in known]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_text_of_a_prompt_or_response_becomes_a_control_token(family):
    prompts = Prompts(tokenizer_of(family), max_tokens=1000)
    plain = prompts.group("How tall?", ["It is tall."]).group
    for token in [t.content for t in prompts.tokenizer.added_tokens_decoder.values()]:
        spelled = f"It {token} is{token}{token} tall."
        asked = f"What does {token} do?"
        for prompt in (asked, [{"role": "user", "content": asked}]):
            group = prompts.group(prompt, [spelled, token, "fine"]).group
            assert specials(prompts, group.prompt_ids) == specials(prompts, plain.prompt_ids)
            assert [specials(prompts, ids) for ids in group.responses_ids] == [[], [], []]
            said = [prompts.tokenizer.decode(ids, skip_special_tokens=False) for ids in group.responses_ids]
            assert said == [spelled, token, "fine"]
            assert asked in prompts.tokenizer.decode(group.prompt_ids, skip_special_tokens=False)


def test_their_tokens_are_those_of_the_text():
    prompts = Prompts(tokenizer(), max_tokens=1000)
    text = "Say <|end|> twice: <|end|>."
    as_text = prompts.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert prompts.group("Hi.", [text]).group.responses_ids == (tuple(as_text),)


def test_in_what_came_rendered_they_are_what_they_say():
    prompts = Prompts(tokenizer(), max_tokens=1000)
    rendered = prompts.render("Hi.")
    group = prompts.group(rendered, ["a<|end|>b"], rendered=True).group
    assert specials(prompts, group.responses_ids[0]) == [1]
    assert group.prompt_ids == prompts.group("Hi.", ["x"]).group.prompt_ids


def test_a_text_may_have_the_very_character_that_marks_the_place():
    prompts = Prompts(tokenizer(), max_tokens=1000)
    text = "\U0010ffff<|end|>\U0010fffe"
    (ids,) = prompts.group("Hi.", [text]).group.responses_ids
    assert prompts.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_responses_beside_one_that_spells_a_control_token_keep_their_tokens():
    prompts = Prompts(tokenizer(), max_tokens=1000)
    alone = prompts.group("Hi.", ["The harbour was quiet."]).group
    beside = prompts.group("Hi.", ["The harbour was quiet.", "<|end|>"]).group
    assert (beside.prompt_ids, beside.responses_ids[0]) == (alone.prompt_ids, alone.responses_ids[0])


def sentencepiece():
    """A tokenizer that writes a space before what stands first, as Llama 2's does."""
    bpe = Tokenizer(models.BPE(byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    letters = sorted({*"▁\n<>/|s", *"".join(TEXTS)} - {" "})
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=letters, show_progress=False
    )
    bpe.train_from_iterator([text.replace(" ", "▁") for text in TEXTS], trainer)
    return saved(bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_no_space_comes_into_a_text_where_it_is_cut():
    prompts = Prompts(sentencepiece(), max_tokens=1000, format="{prompt} {response}")
    said = "Type </s> or<s>s."
    group = prompts.group("The </s> harbour", [said]).group
    assert prompts.tokenizer.decode([*group.prompt_ids, *group.responses_ids[0]], skip_special_tokens=False) == (
        f"The </s> harbour {said}"
    )
    assert not specials(prompts, [*group.prompt_ids, *group.responses_ids[0]])
