"""Rows and samples in the forms that trainers have, as the service takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def item(prompt: Any, completion: Any) -> dict[str, Any]:
    """A prompt and its completion, each a text or a list of messages, for ``score`` and ``reward``.

    Raises:
        ValueError: the completion does not end with a message of the assistant.
    """
    if isinstance(completion, str):
        return {"prompt": prompt if isinstance(prompt, str) else messages(prompt), "response": completion}
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else messages(prompt)
    answer = messages(completion)
    if not answer or answer[-1]["role"] != "assistant":
        raise ValueError("a completion must end with a message of the assistant")
    return {"messages": [*before, *answer]}


def pair(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a preference dataset, for ``margin`` and ``reward_pairs``.

    ``chosen`` and ``rejected`` are texts, or messages: the answer alone, or the whole conversation with it at its end.

    Raises:
        ValueError: there is no prompt, or the two conversations have different ones.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("chosen and rejected must both be texts, or both be messages")
    prompt = row.get("prompt")
    if isinstance(chosen, str):
        if prompt is None:
            raise ValueError("a pair of texts needs a prompt; TRL's extract_prompt splits it off")
        return {
            "prompt": prompt if isinstance(prompt, str) else messages(prompt),
            "chosen": chosen,
            "rejected": rejected,
        }
    (chosen_before, chosen_answer), (rejected_before, rejected_answer) = _last(chosen), _last(rejected)
    if chosen_before != rejected_before:
        raise ValueError("chosen and rejected answer different conversations")
    before: Any = chosen_before or (prompt if isinstance(prompt, str) else messages(prompt or []))
    if not before:
        raise ValueError("the pair has no prompt")
    return {"prompt": before, "chosen": chosen_answer, "rejected": rejected_answer}


def messages(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Roles and texts; parts of a message that are no text, and other fields, are left out."""
    return [{"role": str(turn["role"]), "content": _text(turn.get("content"))} for turn in turns]


def _last(turns: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, str]], str]:
    *before, answer = messages(turns)
    if answer["role"] != "assistant":
        raise ValueError("chosen and rejected must end with a message of the assistant")
    return before, answer["content"]


def _text(content: Any) -> str:
    if isinstance(content, str) or content is None:
        return content or ""
    return "".join(part["text"] for part in content if isinstance(part.get("text"), str))
