import pytest

from inward_client.errors import (
    BadRequest,
    Conflict,
    ConnectionFailed,
    OverQuota,
    ServerError,
    TimedOut,
    Unavailable,
    UnreadableAnswer,
)
from inward_client.retries import Retries, wait_before_retry

PATIENT = Retries(most=3, first=0.5, cap=10.0)


def wait(failure, tries=1, *, repeatable=True, chance=0.0):
    return wait_before_retry(failure, tries, PATIENT, repeatable=repeatable, chance=chance)


def test_retry_after_is_obeyed_to_the_second_and_capped():
    assert wait(Unavailable("", retry_after=7)) == 7
    assert wait(Unavailable("", retry_after=700)) == 10
    assert wait(OverQuota("", retry_after=0)) == 0


def test_without_it_the_wait_doubles_up_to_the_cap():
    assert [wait(ServerError(""), tries) for tries in (1, 2, 3)] == [0.5, 1.0, 2.0]
    assert wait_before_retry(ServerError(""), 99, Retries(most=99, cap=10.0), repeatable=True, chance=0.0) == 10


def test_what_is_being_worked_out_for_an_earlier_try_is_waited_for_longer_and_longer():
    assert [wait(Conflict("", retry_after=1), tries) for tries in (1, 2, 3)] == [1, 2, 4]


def test_jitter_only_ever_lengthens_the_wait_and_by_a_quarter_at_most():
    assert [wait(Unavailable("", retry_after=8), chance=chance) for chance in (0.0, 0.5, 1.0)] == [8, 9, 10]


def test_it_gives_up_after_the_most_tries():
    assert wait(Unavailable(""), 3) is not None
    assert wait(Unavailable(""), 4) is None
    assert wait_before_retry(Unavailable(""), 1, Retries(most=0), repeatable=True, chance=0.0) is None


@pytest.mark.parametrize(
    ("failure", "repeatable", "again"),
    [
        (BadRequest(""), True, False),
        (ServerError("", status=502), True, True),
        (ServerError("", status=501), True, False),
        (TimedOut(""), True, True),
        (UnreadableAnswer(""), True, True),
        (Conflict(""), True, False),
        (Conflict("", retry_after=1), True, True),
        (ConnectionFailed("", sent=True), False, False),
        (ConnectionFailed("", sent=False), False, True),
        (ServerError(""), False, False),
        (Unavailable(""), False, True),
    ],
)
def test_only_what_may_go_better_and_does_no_harm_is_sent_again(failure, repeatable, again):
    assert (wait(failure, repeatable=repeatable) is not None) == again
