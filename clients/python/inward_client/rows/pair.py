"""What a row holds of a pair: its prompt with the whole context, and its answers.

The context of a row is never dropped: what stands before the last turn of an answer, a ``system`` column, Alpaca's
``input`` and ``history``. What can't be carried (``tools``, images) is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inward_client.rows.errors import DataError
from inward_client.rows.messages import (
    Messages,
    Prompt,
    answer,
    as_turns,
    given,
    is_messages,
    joined,
    messages,
    same,
    text_or_messages,
)

Row = Mapping[str, Any]
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]?")
UNCARRIED = ("tools", "images", "image", "videos", "audios")
"""Columns of a row's context that are no text."""
NONE_AS_TEXT = frozenset({"", "[]", "{}", "null"})
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Pair:
    """A preference: one prompt and two answers to it, ``chosen`` the better (safer) one."""

    prompt: Prompt
    chosen: str
    rejected: str

    def body(self) -> dict[str, Any]:
        """As an element of the service's ``pairs``."""
        return {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}

    @property
    def tie(self) -> bool:
        """Whether both answers are the same, so that neither is better."""
        return self.chosen == self.rejected


def read_prompt(row: Row) -> Prompt:
    """What was asked, in a row of any layout that has it apart from the answers; with its context.

    Raises:
        DataError: there is none, or names the column that is wrong.
    """
    prompt = with_system(row, _prompt(row))
    check_unicode(prompt)
    return prompt


def read_item(prompt: Any, response: Any) -> tuple[Prompt, str]:
    """A prompt and a response as trainers have them, each a text or messages: the whole context, and the answer.

    Raises:
        DataError: names which of them is wrong.
    """
    asked: Prompt | None = None
    if prompt is not None and not (isinstance(prompt, list | tuple) and not prompt):
        asked = prompt if isinstance(prompt, str) else messages(prompt, "prompt")
    before, said = answer(response, "response")
    context = _ends_with_a_question(joined(asked, before, "response"), "prompt")
    return context, said


def paired(row: Row, prompt: Prompt | None, chosen: Any, rejected: Any, names: Sequence[str]) -> Pair:
    """A pair of what a row holds: two answers with the one context that both have.

    Args:
        names: of the columns of ``chosen`` and ``rejected``.

    Raises:
        DataError: names the column that is wrong.
    """
    contexts, answers = [], []
    for column, value in zip(names, (chosen, rejected), strict=True):
        before, said = answer(value, column)
        context = joined(prompt, before, column)
        if context is None:
            raise DataError(
                f"{column!r} has nothing before the assistant's turn, and there is no 'prompt'", column=column
            )
        contexts.append(context)
        answers.append(said)
    if not same(*map(as_turns, contexts)):
        raise DataError(
            f"{names[0]!r} and {names[1]!r} answer different prompts: they must be the same up to the last turn",
            column=names[1],
        )
    context = _ends_with_a_question(with_system(row, contexts[0]), "prompt")
    return Pair(context, *answers)


def with_system(row: Row, prompt: Prompt) -> Prompt:
    """The prompt after the row's ``system`` text; tools and images are refused.

    Raises:
        DataError: the row has them, or the conversation has another system turn of its own.
    """
    for name in UNCARRIED:
        held = row.get(name)
        if given(held) and not (isinstance(held, str) and held.strip() in NONE_AS_TEXT):
            raise DataError(
                f"{name!r} is context which a prompt of text can't carry: read the row without it (--columns {name}=)",
                column=name,
            )
    system = row.get("system")
    if not given(system):
        return prompt
    if not isinstance(system, str):
        raise DataError("'system' must be text", column="system")
    turns, first = as_turns(prompt), {"role": "system", "content": system}
    if turns[0]["role"] == "system":
        if same(turns[:1], [first]):
            return turns
        raise DataError("'system' and the system turn of the conversation differ", column="system")
    return [first, *turns]


def transcript(said: str) -> Messages:
    """``Human: … Assistant: …`` as messages, without an empty last one.

    Raises:
        DataError: text that does not begin with a speaker.
    """
    parts = TURN.split(said.replace("\r\n", "\n"))
    if parts[0].strip() or len(parts) < 3:
        raise DataError("a transcript must begin with 'Human:' or 'Assistant:'")
    turns = [
        {"role": SPEAKERS[who], "content": what.strip()} for who, what in zip(parts[1::2], parts[2::2], strict=True)
    ]
    return turns[:-1] if not turns[-1]["content"] else turns


def is_transcript(value: Any) -> bool:
    """Whether a text is a conversation in the form of the HH data."""
    if not isinstance(value, str) or not value.lstrip().startswith("Human:"):
        return False
    return "\n\nAssistant:" in value.replace("\r\n", "\n")


def which(value: Any) -> int | None:
    """0 or 1, however it is written: a number, a text, true or false; None for anything else."""
    if isinstance(value, str):
        value = {"true": 1, "false": 0}.get(value.strip().lower(), value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number in (0.0, 1.0) else None


def check_unicode(value: Any) -> None:
    """Refuses texts that no tokenizer takes.

    Raises:
        DataError: half of a surrogate pair.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError("text that is not Unicode: half of a surrogate pair") from None


def get(row: Row, column: str) -> Any:
    """A cell that must be there.

    Raises:
        DataError: names the column, and those that the row has.
    """
    if row.get(column) is None:
        raise DataError(f"{column!r} is missing; the row has {_names(row)}", column=column)
    return row[column]


def alpaca_prompt(row: Row) -> Prompt:
    """Instruction and input are one turn, as LLaMA-Factory and Stanford's own template read them."""
    asked = "\n".join(text_of(row, name) for name in ("instruction", "input") if given(row.get(name)))
    turns: Messages = []
    if is_messages(row.get("history")):
        return [*messages(row["history"], "history"), {"role": "user", "content": asked}]
    for exchange in row.get("history") or ():
        if (
            not isinstance(exchange, list | tuple)
            or len(exchange) != 2
            or not all(isinstance(t, str) for t in exchange)
        ):
            raise DataError("'history' must be a list of [question, answer] texts, or messages", column="history")
        turns += [{"role": "user", "content": exchange[0]}, {"role": "assistant", "content": exchange[1]}]
    return [*turns, {"role": "user", "content": asked}] if turns else asked


def _prompt(row: Row) -> Prompt:
    """Of a row whose layout is not known."""
    if row.get("instruction") is not None:
        return alpaca_prompt(row)
    for column in ("prompt", "messages", "conversations", "question"):
        if row.get(column) is not None:
            found = text_or_messages(row[column], column)
            return transcript(found) if is_transcript(found) else found  # type: ignore[arg-type]
    raise DataError(f"'prompt' is missing; the row has {_names(row)}", column="prompt")


def _ends_with_a_question(context: Prompt | None, column: str) -> Prompt:
    if context is None:
        raise DataError("there is nothing before the assistant's turn, and no prompt", column=column)
    if not isinstance(context, str) and context[-1]["role"] == "assistant":
        raise DataError("the conversation before the answer ends with the assistant: who is answered?", column=column)
    return context


def text_of(row: Row, column: str) -> str:
    value = get(row, column)
    if not isinstance(value, str):
        raise DataError(f"{column!r} must be text", column=column)
    return value


def _names(row: Row) -> str:
    return ", ".join(sorted(str(name) for name, value in row.items() if value is not None)) or "no columns"
