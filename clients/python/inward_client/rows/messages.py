"""Chat messages as datasets and libraries write them → roles and texts; nothing is dropped in between.

A turn is ``{role, content}`` or ``{from, value}``. Its content is a text, or parts of which all are text. What is no
text (images, tool calls, nothing at all) is refused by name, because the rest without it is another conversation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from inward_client.rows.errors import DataError

Messages = list[dict[str, str]]
Prompt = str | Messages
ROLES = ("system", "developer", "user", "assistant", "tool")
ALIASES = {"human": "user", "gpt": "assistant", "observation": "tool"}
"""Sharegpt's names."""
TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
UNSAID = ("reasoning_content", "reasoning", "thinking", "audio", "images")
"""Fields of a turn that hold something else than what was said. Beside an answer they are no part of it; a turn that
has nothing else is no empty answer.
"""


def is_messages(value: Any) -> bool:
    """Whether a value is meant as a list of turns, whatever is wrong with them."""
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in value)
    )


def messages(value: Any, column: str) -> Messages:
    """A list of turns as roles and texts.

    Raises:
        DataError: names column, turn, and what is there that is no text.
    """
    if isinstance(value, Mapping):
        value = [value]
    if not is_messages(value):
        raise DataError(
            f"{column!r} must be a list of {{role, content}} or {{from, value}} messages that is not empty",
            column=column,
        )
    return [_message(turn, f"{column!r}, message {i}", column) for i, turn in enumerate(value, start=1)]


def text(content: Any, where: str, column: str | None = None) -> str:
    """The text of a message's content: a string, or its parts put together; a refusal is its text.

    Raises:
        DataError: a part, or the whole, is no text.
    """
    if isinstance(content, str):
        return content
    if content is None or content == [] or content == ():
        raise DataError(f"{where} has no content: there is nothing to score", column=column)
    if not isinstance(content, list | tuple):
        raise DataError(f"{where} has content that is neither a text nor a list of parts", column=column)
    return "".join(_part(part, where, column) for part in content)


def text_or_messages(value: Any, column: str) -> Prompt:
    """A text as it is, or ``messages``.

    Raises:
        DataError: it is neither.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, Mapping | list | tuple):
        raise DataError(f"{column!r} must be text, or chat messages", column=column)
    return messages(value, column)


def answer(value: Any, column: str) -> tuple[Messages, str]:
    """What stands before an answer, and the answer: a text, or messages that end with it.

    Raises:
        DataError: it is neither, or does not end with the assistant.
    """
    said = text_or_messages(value, column)
    if isinstance(said, str):
        return [], said
    *before, last = said
    if last["role"] != "assistant":
        raise DataError(f"{column!r} must end with the assistant's turn: it is what is compared", column=column)
    return before, last["content"]


def as_turns(prompt: Prompt) -> Messages:
    """A prompt as messages: a text is one turn of the user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def joined(prompt: Prompt | None, before: Messages, column: str) -> Prompt | None:
    """The whole context of an answer: the row's prompt and the turns that stand before the answer itself, each once.

    Datasets repeat the prompt in the answer's conversation (with a system turn or a whole conversation before it, or
    more turns after it), or go on from it. A repeated prompt counts once, whatever white space is around it.

    Raises:
        DataError: the turns neither hold the prompt nor go on from it.
    """
    if not before:
        return prompt
    if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
        return before
    turns = as_turns(prompt)
    if same(turns, before):
        return prompt
    start = next((i for i, turn in enumerate(before) if turn["role"] not in ("system", "developer")), len(before))
    if any(same(turns, before[i : i + len(turns)]) for i in (0, start)):
        return before
    for shared in range(min(len(turns), len(before)), 0, -1):
        if same(turns[-shared:], before[:shared]):
            return [*turns, *before[shared:]]
    if before[0]["role"] in ("assistant", "tool") or turns[-1]["role"] == "assistant":
        return [*turns, *before]
    if same(turns, before[-len(turns) :]):  # the last question of the conversation
        return before
    raise DataError(
        f"{column!r} holds a conversation that neither repeats the prompt nor goes on from it: which of the two was "
        "asked can't be told",
        column=column,
    )


def same(some: Sequence[Mapping[str, str]], others: Sequence[Mapping[str, str]]) -> bool:
    """Whether two conversations are equal up to white space around their turns."""
    return len(some) == len(others) and all(
        one["role"] == other["role"] and one["content"].strip() == other["content"].strip()
        for one, other in zip(some, others, strict=True)
    )


def _message(turn: Mapping[str, Any], where: str, column: str) -> dict[str, str]:
    role, key = (turn["role"], "content") if turn.get("role") is not None else (turn.get("from"), "value")
    if role == "function_call" or any(given(turn.get(name)) for name in ("tool_calls", "function_call")):
        raise DataError(f"{where} calls a tool, which is no text and can't be scored", column=column)
    role = ALIASES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise DataError(f"{where} has the role {role!r}, which is none of {', '.join(ROLES)}", column=column)
    content = turn.get(key)
    if not content and isinstance(turn.get("refusal"), str):
        content = turn["refusal"]
    if content == "" and (unsaid := next((name for name in UNSAID if given(turn.get(name))), None)):
        raise DataError(f"{where} has {unsaid!r} and no text: there is nothing to score", column=column)
    return {"role": role, "content": text(content, where, column)}


def _part(part: Any, where: str, column: str | None) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    said = None
    if isinstance(part, Mapping):
        said = part.get("refusal") if kind == "refusal" else part.get("text") if kind in (None, *TEXT_PARTS) else None
    if not isinstance(said, str):
        raise DataError(f"{where} has a part of type {kind!r} that is no text: only text can be scored", column=column)
    return said


def given(value: Any) -> bool:
    """Whether a cell holds something."""
    return value is not None and (not hasattr(value, "__len__") or len(value) > 0)
