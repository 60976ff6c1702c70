"""What is too long, and what is cut of it."""

import pytest

from inward.errors import TooLarge
from inward.prompts import Prompts
from inward.prompts.length_limit import fit_each, fit_length
from inward.types import Group
from support.tiny_tokenizer import tokenizer


def prompts(**options):
    return Prompts(tokenizer(), **{"max_tokens": 200, **options})


def test_one_token_is_kept_free_for_the_eos():
    group = Group((0, 5, 6), ((7, 8),))
    assert fit_length(group, 6, bos=(0,), truncate=False).group == group
    with pytest.raises(TooLarge, match="longer than the 4 tokens"):
        fit_length(group, 5, bos=(0,), truncate=False)
    assert fit_length(group, 5, bos=(0,), truncate=True).group == Group((0, 6), ((7, 8),))
    assert fit_length(group, 5, bos=(), truncate=True).group == Group((5, 6), ((7, 8),))


def test_a_response_that_is_still_to_be_drawn_has_its_place_where_text_may_be_cut():
    group = Group((0, 5, 6, 7, 8, 9, 10, 11))
    assert fit_length(group, 9, bos=(0,), truncate=False, reserve=3).group == group
    cut = fit_length(group, 9, bos=(0,), truncate=True, reserve=3)
    assert cut.truncated and cut.group == Group((0, 8, 9, 10, 11))
    assert fit_length(group, 9, bos=(0,), truncate=True, reserve=100).group == Group((0, 11))  # a quarter is left
    assert not fit_length(Group((0, 5, 6)), 9, bos=(0,), truncate=True, reserve=5).truncated


def test_where_each_is_judged_by_itself_the_prompt_is_cut_by_its_own_length_and_few_prompts_are_computed():
    prompt = tuple(range(1000))
    own = [Group(prompt, ((7,) * n,)) for n in (1, 3, 150, 151, 190, 900)]
    together = Group(prompt, tuple(group.responses_ids[0] for group in own))
    found = {i: piece for places, piece in fit_each(together, 1001, bos=(0,)) for i in places}
    for i, group in enumerate(own):
        ((_, alone),) = fit_each(group, 1001, bos=(0,))
        assert alone.group.prompt_ids == found[i].group.prompt_ids
        assert len(alone.group.prompt_ids) + len(alone.group.responses_ids[0]) <= 1000
    many = Group(prompt, tuple((7,) * n for n in range(1, 3000, 7)))
    assert len(fit_each(many, 1001, bos=(0,))) <= 16
    ((places, whole), *_) = fit_each(Group(prompt[:500], ((7,) * 600, (7,), (8,))), 1001, bos=(0,))[1:]
    assert places == (1, 2) and not whole.truncated


def test_text_that_is_too_long_is_refused_and_the_longest_response_named():
    with pytest.raises(TooLarge) as caught:
        prompts(max_tokens=40).group("short", ["fine", "x y z " * 50])
    assert caught.value.param == "responses.1"
    assert "truncate" in caught.value.message


def test_truncation_cuts_the_oldest_prompt_tokens_keeps_the_bos_and_says_so():
    p = prompts(max_tokens=60)
    whole = prompts(max_tokens=10_000).group("one two three " * 40, ["The coast redwood.", "No."]).group
    cut = p.group("one two three " * 40, ["The coast redwood.", "No."], truncate=True)
    assert cut.truncated
    assert cut.group.responses_ids == whole.responses_ids
    assert cut.group.prompt_ids[0] == 0
    assert cut.group.prompt_ids[1:] == whole.prompt_ids[-(len(cut.group.prompt_ids) - 1) :]
    assert len(cut.group.prompt_ids) + max(map(len, cut.group.responses_ids)) == 59


def test_a_response_that_alone_is_too_long_loses_its_end_only_on_request():
    cut = prompts(max_tokens=30).group("hi", ["seven birds on the wire " * 40], truncate=True)
    assert cut.truncated
    assert len(cut.group.prompt_ids) + len(cut.group.responses_ids[0]) == 29
