"""Text while it is drawn: whatever is told is what the whole text begins with."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from inward.backbones.decoding import Decoder, before_stop
from inward.backbones.generation import finished
from inward.types import SamplingSpec
from support.tiny_tokenizer import saved, tokenizer

BYTE_LEVEL = tokenizer()


def with_byte_fallback(**config: object):
    """As Llama 2 and Gemma have it: words of a vocabulary, and what is in none byte by byte."""
    words = ["<unk>", "</s>", "\u2581a", "b", "\u2581", "'", ".", "\u2581n't", "\u2581do"]
    vocabulary = [*words, *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(
        models.BPE({word: i for i, word in enumerate(vocabulary)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return saved(backend, eos_token="</s>", **config)


def tidying():
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "do", "n't", ".", "'", "boys", "##s", "t"])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    return saved(backend, clean_up_tokenization_spaces=True)


KINDS = {"byte level": BYTE_LEVEL, "byte fallback": with_byte_fallback(), "tidied": tidying()}
DRAWN = st.lists(st.integers(0, 10**6), max_size=40)


@pytest.mark.parametrize("kind", KINDS)
@given(drawn=DRAWN)
@settings(max_examples=150, deadline=None)
def test_the_text_of_any_tokens_begins_with_what_was_certain_before(kind, drawn):
    decoder = Decoder(KINDS[kind])
    ids = tuple(i % len(KINDS[kind]) for i in drawn)
    told = ""
    for t in range(len(ids) + 1):
        text = decoder.certain(ids[:t])
        assert text.startswith(told) or told.startswith(text)
        told = max(told, text, key=len)
        assert not told.endswith("\ufffd")
    assert decoder.text(ids).startswith(told)


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_half_a_character_waits_for_its_other_half_and_nothing_else_does(kind):
    decoder, text = Decoder(KINDS[kind]), "a \u20ac b \U0001f642"
    ids = tuple(KINDS[kind](text, add_special_tokens=False)["input_ids"])
    told = [decoder.certain(ids[:t]) for t in range(len(ids) + 1)]
    assert all(text.startswith(one) for one in told)
    assert len(set(told)) >= 5  # it comes little by little
    assert decoder.text(ids) == text


STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


@given(st.text("ab\n\u20ac", max_size=24), STOPS, st.lists(st.integers(1, 4), max_size=24))
@settings(max_examples=300, deadline=None)
def test_nothing_of_a_stop_string_is_told_whatever_the_portions(text, stops, portions):
    """As a drawing goes on: after each token it ends if a stop string is there."""
    spec, drawn, told = SamplingSpec(1, max_tokens=10**6, stop=tuple(stops)), "", ""
    sizes = iter(portions)
    while len(drawn) < len(text) and not any(stop in drawn for stop in stops):
        now = before_stop(drawn, stops)
        assert now.startswith(told)
        told = now
        drawn = text[: len(drawn) + next(sizes, 1)]
    assert finished([*map(ord, drawn)], Characters(), (), spec).text.startswith(told)


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
@given(DRAWN, st.integers(0, 60), st.integers(1, 3))
@settings(max_examples=300, deadline=None)
def test_what_is_read_of_an_answer_is_its_text_also_where_a_stop_string_begins_within_a_token(kind, drawn, at, length):
    tokenizer = KINDS[kind]
    ids = [i % len(tokenizer) for i in drawn]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    stop = text[at : at + length] or "x"
    sample = finished(ids, tokenizer, (), SamplingSpec(1, max_tokens=1000, stop=(stop,)))
    assert sample.text == text.partition(stop)[0]
    if "\ufffd" not in text:
        assert tokenizer.decode(sample.ids, skip_special_tokens=True) == sample.text
    if stop not in text:
        assert sample.ids == tuple(ids)


class Characters:
    """A token a character."""

    def decode(self, ids, *, skip_special_tokens):
        return "".join(map(chr, ids))


def test_what_cannot_become_a_stop_string_any_more_is_told():
    assert before_stop("one\n", ("\n\n",)) == "one"
    assert before_stop("one\ntwo", ("\n\n",)) == "one\ntwo"
    assert before_stop("one\n\ntwo", ("\n\n", "e\n")) == "on"
    assert before_stop("aab", ("aabb", "b")) == ""
    assert before_stop("text", ()) == "text"
