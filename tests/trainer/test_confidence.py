import math

import pytest

from inward_trainer.confidence import Confidence
from inward_trainer.errors import DataError
from inward_trainer.pairs import ScoredPair, read_row


def pair(chosen=None, rejected=None, confidence=None):
    return ScoredPair("7", "p", "c", "r", confidence=confidence, chosen_score=chosen, rejected_score=rejected)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


PAIRS = [pair(2.0, 1.0, 0.7), pair(0.5, -0.5, 0.9), pair(-1.0, 1.0, 0.55)]


def test_plain_and_fixed_look_at_no_score():
    assert Confidence("plain")([pair(), pair()]) == [1.0, 1.0]
    assert Confidence("fixed", gamma=0.8)([pair(), pair()]) == [0.8, 0.8]


def test_each_pairs_own_from_the_service():
    assert Confidence()(PAIRS) == [0.7, 0.9, 0.55]
    assert Confidence(floor=0.6)(PAIRS) == [0.7, 0.9, 0.6]


def test_squashed_and_raw_are_worked_out_from_rewards():
    squashed = [sigmoid(7.5 * (sigmoid(p.chosen_score) - sigmoid(p.rejected_score))) for p in PAIRS]
    raw = [sigmoid(7.5 * (p.chosen_score - p.rejected_score)) for p in PAIRS]
    assert Confidence(scale="squashed", floor=0)(PAIRS) == pytest.approx(squashed)
    assert Confidence(scale="raw", floor=0)(PAIRS) == pytest.approx(raw)
    assert raw[0] > 0.999, "raw scores saturate, which is why they are squashed"
    assert Confidence(scale="raw")(PAIRS)[2] == 0.5, (
        "a pair that the head takes for flipped is not trained round, only ignored"
    )


def test_a_batch_has_one_value_for_all():
    assert Confidence("batch")(PAIRS) == pytest.approx([2.15 / 3] * 3)


def test_far_rewards_do_not_overflow():
    assert Confidence(scale="raw", floor=0)([pair(1e4, -1e4), pair(-1e4, 1e4)]) == [1.0, 0.0]


@pytest.mark.parametrize("scale", ["service", "squashed", "raw"])
def test_a_pair_without_what_is_needed_is_named(scale):
    with pytest.raises(DataError, match="pair 7"):
        Confidence(scale=scale)([pair()])


def test_rows_as_texts_and_as_messages_are_the_same_pair():
    said = [{"role": "user", "content": "Birds?"}]
    as_chat = {
        "messages": said,
        "chosen": [{"role": "assistant", "content": "Seven."}],
        "rejected": "No.",
        "confidence": 1,
        "extra": 0,
    }
    assert read_row(as_chat, "3") == ScoredPair("3", said, "Seven.", "No.", confidence=1.0)


def test_a_row_says_whether_its_answers_were_cut():
    row = {
        "prompt": "p",
        "chosen": "a",
        "rejected": "b",
        "chosen_finish_reason": "stop",
        "rejected_finish_reason": "length",
    }
    assert read_row(row, "0").finished == (True, False)
    assert read_row(row | {"chosen_finish_reason": None}, "0").finished == (True, False)


@pytest.mark.parametrize("reason", ["length", "rejected", "guard"])
def test_an_answer_that_did_not_end_by_itself_is_not_finished(reason):
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_finish_reason": reason, "rejected_finish_reason": ""}
    assert read_row(row, "0").finished == (False, True)


def test_scores_of_another_head_than_a_hybrid_one_are_not_taken_for_its_own():
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "confidence": 0.95, "chosen_score": 14, "rejected_score": 11}
    legend = read_row(row | {"head": {"name": "legend", "kind": "legend"}}, "7", as_scored=True)
    assert (legend.chosen_score, legend.rejected_score) == (None, None)
    assert Confidence()([legend]) == [0.95]
    for scale in ("raw", "squashed"):
        with pytest.raises(DataError, match="pair 7 has no scores"):
            Confidence(scale=scale)([legend])
    for head in ({"head": {"name": "kindness", "kind": "hybrid"}}, {"head": "kindness"}, {}):
        assert read_row(row | head, "7").chosen_score == 14.0


@pytest.mark.parametrize(
    ("row", "blamed"),
    [
        ({"chosen": "a", "rejected": "b"}, "prompt"),
        ({"prompt": "p", "chosen": 3, "rejected": "b"}, "chosen"),
        ({"prompt": "p", "chosen": "a", "rejected": [{"role": "user", "content": "b"}]}, "rejected"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "confidence": 1.5}, "confidence"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "chosen_score": float("nan")}, "chosen_score"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "chosen_score": "nan"}, "chosen_score"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "rejected_score": "high"}, "rejected_score"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "confidence": "1.5"}, "confidence"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "confidence": True}, "confidence"),
    ],
)
def test_rows_that_are_no_pairs_are_refused_by_field(row, blamed):
    with pytest.raises(DataError, match=f"row 5: ['`]{blamed}['`]"):
        read_row(row, "5")
