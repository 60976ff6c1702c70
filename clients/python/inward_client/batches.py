"""A list that is too long for one request: which parts are still to be asked, and the whole once all of them are
answered.

Pure. One version of head and policy answers the whole: parts answered before a switch are asked again after it. A part
of which no element can be scored is halved until those to blame stand alone, so that an answer does not depend on how
the list was split; one that is too large, or takes longer than the service allows, is halved as well.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, cast

from inward_client.answers import Answer, ItemError, Usage
from inward_client.calls import Call, Element, listed
from inward_client.errors import DeadlineExceeded, InvalidField, ServerError, StatusError, TooLarge, Unavailable

A = TypeVar("A", bound=Answer)
SWITCHES = 3
"""How often a head may be switched under one call before it gives up."""


@dataclass(frozen=True)
class Part:
    """Elements ``start`` to ``stop``."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Batches(Generic[A]):
    """The parts of one list.

    Args:
        elements: the list.
        size: most elements of one request.
        call: makes the request for some of the elements.
        sent_as, answered_as: the list's field in the request and in the answer.
        unscored: makes the element of an answer that holds an error instead of scores.

    Raises:
        TypeError: an element is no dict.
    """

    def __init__(
        self,
        elements: Iterable[Element],
        size: int,
        call: Callable[[Sequence[Element]], Call[A]],
        sent_as: str,
        answered_as: str,
        unscored: Callable[[ItemError], Any],
    ) -> None:
        self._elements = listed(sent_as, elements)
        self._call, self._sent_as, self._answered_as, self._unscored = call, sent_as, answered_as, unscored
        self.total, self.unit = len(self._elements), sent_as
        starts = range(0, max(self.total, 1), size)  # an empty list is the service's to refuse
        self._waiting = deque(Part(start, min(start + size, self.total)) for start in starts)
        self._asked = 0
        self._answers: dict[Part, A] = {}
        self._refused: dict[Part, StatusError] = {}
        self._latest: A | None = None
        self._switches = 0

    def take(self, most: int) -> list[Part]:
        """At most ``most`` parts to ask now; none when all is answered, or while others are being asked.

        Raises:
            Unavailable: the head was switched again and again.
        """
        if not self._waiting and not self._asked:
            self._ask_stale_again()
        taken = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
        self._asked += len(taken)
        return taken

    def call(self, part: Part) -> Call[A]:
        """The request for a part."""
        return self._call(self._elements[part.start : part.stop])

    def answered(self, part: Part, answer: A) -> int:
        """Takes an answer; the number of elements that it settles."""
        self._asked -= 1
        self._answers[part] = self._latest = answer
        return len(part)

    def failed(self, part: Part, error: StatusError) -> int:
        """Takes a refusal; the number of elements that it settles.

        Raises:
            StatusError: ``error``, if it is not the fault of single elements.
        """
        too_much = isinstance(error, TooLarge) or (isinstance(error, DeadlineExceeded) and len(part) > 1)
        blamed = isinstance(error, InvalidField) or (isinstance(error, ServerError) and error.of_one_element)
        blamed = blamed and (error.param or "").startswith(f"{self._sent_as}.")
        if not part.stop or not (too_much or blamed):
            raise error
        self._asked -= 1
        if len(part) == 1:
            self._refused[part] = error
            return 1
        middle = (part.start + part.stop) // 2
        self._waiting.extendleft([Part(middle, part.stop), Part(part.start, middle)])
        return 0

    def whole(self) -> A:
        """The answer to all elements.

        Raises:
            StatusError: none of them could be scored; the first one's error, which holds all of them.
        """
        if not self._answers:
            each = [self._refused[part] for part in sorted(self._refused, key=lambda part: part.start)]
            each[0].each = each
            raise each[0]
        elements: list[Any] = [None] * len(self._elements)
        usage = Usage()
        for part, answer in self._answers.items():
            usage += answer.usage
            elements[part.start : part.stop] = [self._moved(e, part.start) for e in getattr(answer, self._answered_as)]
        for part, error in self._refused.items():
            kind = "internal_error" if isinstance(error, ServerError) else "invalid_request_error"
            detail = ItemError(error.message, kind, error.param, error.code)
            elements[part.start] = self._unscored(self._placed(detail, part.start))
        changes: dict[str, Any] = {"usage": usage, self._answered_as: elements}
        return replace(cast(A, self._latest), **changes)

    def _ask_stale_again(self) -> None:
        newest = self._latest
        if newest is None:
            return
        stale = [part for part, answer in self._answers.items() if _version(answer) != _version(newest)]
        self._switches += bool(stale)
        if self._switches > SWITCHES:
            raise Unavailable("the head was switched again and again during this call; call again")
        for part in stale:
            del self._answers[part]
        self._waiting.extend(stale)

    def _moved(self, element: Any, start: int) -> Any:
        if element.error is None or not start:
            return element
        return replace(element, error=self._placed(element.error, start))

    def _placed(self, error: ItemError, start: int) -> ItemError:
        """An error of a part with the place in the whole list, also where its message begins with it."""
        here, there = error.param or "", self._path(error.param, start)
        begins = bool(here) and re.match(rf"{re.escape(here)}(?!\w)", error.message)
        message = f"{there}{error.message[len(here) :]}" if begins else error.message
        return replace(error, message=message, param=there)

    def _path(self, param: str | None, start: int) -> str | None:
        """The path of a field in the whole list, from its path in a part."""
        list_, _, rest = (param or "").partition(".")
        index, dot, field = rest.partition(".")
        return f"{list_}.{int(index) + start}{dot}{field}" if list_ == self._sent_as and index.isdigit() else param


def _version(answer: Answer) -> tuple[Any, str]:
    return answer.head, answer.policy_version
