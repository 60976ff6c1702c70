"""Answers that come as conversations: what stands before the last turn is context, and is never dropped.

The client's reader of rows (``inward_client.rows.messages``) has the same rules, so that a row is the same pair
wherever it is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from inward.errors import InvalidField

Turn = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Context:
    """The turns before an answer, and the field of the request that each came in."""

    turns: list[dict[str, str]]
    fields: tuple[str, ...]

    @classmethod
    def of(cls, turns: Sequence[Turn], field: str) -> Context:
        """Turns that are the list ``field``."""
        return cls([dict(turn) for turn in turns], tuple(f"{field}.{i}" for i in range(len(turns))))

    @classmethod
    def of_text(cls, prompt: str, field: str) -> Context:
        """A prompt that is the text of ``field``: one turn of the user."""
        return cls([{"role": "user", "content": prompt}], (field,))

    def __add__(self, other: Context) -> Context:
        return Context(self.turns + other.turns, self.fields + other.fields)

    def after(self, n: int) -> Context:
        """Without the first ``n`` turns."""
        return Context(self.turns[n:], self.fields[n:])


def joined(prompt: Context, before: Context, field: str) -> Context:
    """The whole context of an answer: the prompt, and the turns ``before`` it that came with the answer, each once.

    Such conversations repeat the prompt (with a system turn or a whole conversation before it, or more turns after it),
    or go on from it. A repeated prompt counts once, whatever white space is around it.

    Raises:
        InvalidField: the turns neither hold the prompt nor go on from it.
    """
    asked, said = prompt.turns, before.turns
    if not said or same(asked, said):
        return prompt
    start = next((i for i, turn in enumerate(said) if turn["role"] not in ("system", "developer")), len(said))
    if any(same(asked, said[i : i + len(asked)]) for i in (0, start)):
        return before
    for shared in range(min(len(asked), len(said)), 0, -1):
        if same(asked[-shared:], said[:shared]):
            return prompt + before.after(shared)
    if said[0]["role"] in ("assistant", "tool") or asked[-1]["role"] == "assistant":
        return prompt + before
    if same(asked, said[-len(asked) :]):  # the last question of the conversation
        return before
    raise InvalidField(
        f"{field} holds a conversation that neither repeats the prompt nor goes on from it: which of the two was asked "
        "can't be told",
        param=field,
    )


def same(some: Sequence[Turn], others: Sequence[Turn]) -> bool:
    """Whether two conversations are equal up to white space around their turns."""
    return len(some) == len(others) and all(
        one["role"] == other["role"] and one["content"].strip() == other["content"].strip()
        for one, other in zip(some, others, strict=True)
    )
