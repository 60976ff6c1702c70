from inward.offline.annotate.duplicates import Repeated, Seen
from inward_client.rows import Pair

WORDS = (
    "a long answer that says the same thing in so many words that one more or less hardly matters to anybody at all "
)


def seen(*pairs):
    found = Seen()
    for pair in pairs:
        found.add(Pair(*pair))
    return found.repeated()


def test_nothing_is_repeated_where_nothing_is():
    assert seen() == Repeated()
    assert seen(("q", "good answer", "bad"), ("q", "another one", "worse"), ("r", "something", "else")) == Repeated()


def test_the_same_row_twice_is_counted_once_and_not_as_nearly_the_same():
    assert seen(("q", "good", "bad"), ("q", "good", "bad"), ("q", "good", "bad")) == Repeated(exact=2)


def test_a_few_other_words_are_nearly_the_same_and_other_case_too():
    assert seen(("q", WORDS * 3, WORDS[::-1] * 3), ("q", WORDS * 3 + "really", WORDS[::-1] * 3)).near == 1
    assert seen(("Q?", WORDS, "No."), ("q", WORDS.upper(), "no")).near == 1


def test_the_other_label_is_told_on_both_rows_and_is_not_nearly_the_same():
    found = seen(("q", WORDS, "bad"), ("q", "bad", WORDS))
    assert (found.both_ways, found.contradictory, found.near, found.exact) == (2, 2, 0, 0)


def test_an_answer_that_is_preferred_here_and_rejected_there_is_one_contradiction_of_one_prompt():
    assert seen(("q", "middling", "bad"), ("q", "good", "middling")).contradictory == 1
    assert seen(("q", "middling", "bad"), ("another q", "good", "middling")).contradictory == 0


def test_a_tie_is_no_contradiction():
    assert seen(("q", "same", "same")) == Repeated()
