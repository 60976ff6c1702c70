import pytest

from inward_client.errors import (
    BadRequest,
    Conflict,
    ConnectionFailed,
    DeadlineExceeded,
    OverQuota,
    ServerError,
    TimedOut,
    Unavailable,
    UnreadableAnswer,
)
from inward_client.retries import Retries, wait_before_retry

PATIENT = Retries(patience=20.0, first=0.5, cap=4.0)


def wait(failure, tries=1, *, failing_s=0.0, repeatable=True, chance=0.0, retries=PATIENT):
    return wait_before_retry(failure, tries, failing_s, retries, repeatable=repeatable, chance=chance)


def test_retry_after_is_obeyed_to_the_second():
    assert wait(Unavailable("", retry_after=7)) == 7
    assert wait(OverQuota("", retry_after=0)) == 0


def test_a_service_that_says_at_once_again_and_again_is_not_asked_without_a_pause():
    assert [wait(Unavailable("", retry_after=0), tries) for tries in (1, 2, 3)] == [0, 1.0, 2.0]


def test_without_it_the_wait_doubles_up_to_the_cap():
    assert [wait(ServerError(""), tries) for tries in (1, 2, 3, 4, 99)] == [0.5, 1.0, 2.0, 4.0, 4.0]


def test_what_is_being_worked_out_for_an_earlier_try_is_waited_for_longer_and_longer():
    assert [wait(Conflict("", retry_after=1), tries) for tries in (1, 2, 3)] == [1, 2, 4]


def test_jitter_only_ever_lengthens_the_wait_and_by_a_quarter_at_most():
    assert [wait(Unavailable("", retry_after=8), chance=chance) for chance in (0.0, 0.5, 1.0)] == [8, 9, 10]


def test_patience_is_seconds_since_the_first_failure_however_many_tries_it_takes():
    assert wait(Unavailable(""), 99, failing_s=15.0) == 4
    assert wait(Unavailable(""), 2, failing_s=19.5) is None
    assert wait(Unavailable("", retry_after=7), 2, failing_s=12.5, chance=1.0) == 7.5, "jitter does not outlast it"
    assert wait(Unavailable("", retry_after=0), retries=Retries(patience=0.0)) is None


def test_a_wait_that_would_outlast_the_patience_is_not_begun():
    assert wait(Unavailable("", retry_after=700)) is None


@pytest.mark.parametrize(
    ("failure", "repeatable", "again"),
    [
        (BadRequest(""), True, False),
        (ServerError("", status=502), True, True),
        (ServerError("", status=501), True, False),
        (ServerError("", code="internal_error", param="pairs.0"), True, False),
        (ServerError("", code="internal_error"), True, True),
        (TimedOut(""), True, True),
        (UnreadableAnswer(""), True, True),
        (Conflict(""), True, False),
        (Conflict("", retry_after=1), True, True),
        (ConnectionFailed("", sent=True), False, False),
        (ConnectionFailed("", sent=False), False, True),
        (ServerError(""), False, False),
        (Unavailable(""), False, True),
        (DeadlineExceeded(""), True, True),
        (DeadlineExceeded("", code="deadline_exceeded"), True, False),
    ],
)
def test_only_what_may_go_better_and_does_no_harm_is_sent_again(failure, repeatable, again):
    assert (wait(failure, repeatable=repeatable) is not None) == again
