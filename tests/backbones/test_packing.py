from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from inward.backbones.readout import NOWHERE
from inward.backbones.transformers.attention import AttentionLayout
from inward.backbones.transformers.packing import cost, pack, pad, rectangles
from inward.types import Group

COSTS = st.lists(st.integers(1, 50), max_size=30)


def test_a_prompt_lies_once_and_each_response_counts_on_from_it() -> None:
    packed = pack([Group((1, 2, 3), ((4, 5), (), (6,))), Group((7,), ((8,),))])
    assert packed.ids_T.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert packed.positions_T.tolist() == [0, 1, 2, 3, 4, 3, 0, 1]
    assert [span.last for group in packed.spans for span in group] == [4, 2, 5, 7]
    assert [span.prompt for group in packed.spans for span in group] == [2, 2, 2, 6]


def test_an_eos_follows_every_response_and_is_not_one_of_its_tokens() -> None:
    packed = pack([Group((1,), ((4, 5), ()))], eos_id=9)
    assert packed.ids_T.tolist() == [1, 4, 5, 9, 9]
    assert packed.positions_T.tolist() == [0, 1, 2, 3, 1]
    assert [(span.rows, span.eos) for span in packed.spans[0]] == [(range(1, 3), 3), (range(4, 4), 4)]
    assert cost(Group((1,), ((4, 5), ())), 9) == 5


def test_padding_is_on_the_right_and_masked() -> None:
    padded = pad([((1, 2), (3,)), ((), (4,))], eos_id=9)
    assert padded.ids_BT.tolist() == [[1, 2, 3, 9], [4, 9, 0, 0]]
    assert padded.mask_BT.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert [(span.prompt, span.rows, span.eos) for span in padded.spans] == [
        (1, range(2, 3), 3),
        (NOWHERE, range(4, 5), 5),
    ]


@given(lengths=COSTS, budget=st.integers(1, 100))
def test_rectangles_cover_everything_within_the_budget_counting_padding(lengths: list[int], budget: int) -> None:
    batches = list(rectangles(lengths, budget))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget for batch in batches)


def test_a_mask_shows_the_past_within_the_window() -> None:
    layout = AttentionLayout((), torch.device("cpu"), torch.float32)
    assert (layout.mask(2, 2, None) == 0).tolist() == [[True, True, True, False], [True, True, True, True]]
    assert (layout.mask(2, 2, 2) == 0).tolist() == [[False, True, True, False], [False, False, True, True]]
