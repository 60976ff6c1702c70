"""Each route as a pure value: what is sent, and how the answer is read. The client sends these and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar
from urllib.parse import quote

from inward_client import answers
from inward_client.answers import read

T = TypeVar("T")
Element = Mapping[str, Any]
Prompt = str | Sequence[Mapping[str, str]]
ITEM = ("prompt", "messages", "response", "response_ids")
PAIR = ("prompt", "messages", "chosen", "rejected")
JSONL = "application/x-ndjson"


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request."""

    method: str
    path: str
    read: Callable[[Any], T]
    """From the answer's JSON."""
    body: Mapping[str, Any] | None = None
    content: bytes | None = None
    """Instead of ``body``: JSONL."""
    params: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = True
    """However often it is sent, it is worked out once (an idempotency key), or again without harm."""
    deadline: bool = False
    """The body takes ``timeout``."""
    stream: bool = False
    """The answer comes as events; it can't be kept for another try."""
    key: str | None = None
    """Idempotency key, where it is the caller's."""


def margin(pairs: Iterable[Element], head: str | None, truncate: bool) -> Call[answers.MarginAnswer]:
    body = {"pairs": [_fields(pair, PAIR) for pair in pairs], **_options(head, truncate)}
    return Call("POST", "/margin", lambda value: read(answers.MarginAnswer, value), body, deadline=True)


def score(
    items: Iterable[Element], head: str | None, truncate: bool, detail: Sequence[str]
) -> Call[answers.ScoreAnswer]:
    body = {"items": [_fields(item, ITEM) for item in items], **_options(head, truncate, detail)}
    return Call("POST", "/score", lambda value: read(answers.ScoreAnswer, value), body, deadline=True)


def reward(
    items: Iterable[Element], head: str | None, truncate: bool, detail: Sequence[str]
) -> Call[answers.RewardAnswer]:
    body = {"items": [_fields(item, ITEM) for item in items], **_options(head, truncate, detail)}
    return Call("POST", "/reward", lambda value: read(answers.RewardAnswer, value), body, deadline=True)


def reward_pairs(
    pairs: Iterable[Element], head: str | None, truncate: bool, detail: Sequence[str]
) -> Call[answers.RewardPairAnswer]:
    body = {"pairs": [_fields(pair, PAIR) for pair in pairs], **_options(head, truncate, detail)}
    return Call("POST", "/reward", lambda value: read(answers.RewardPairAnswer, value), body, deadline=True)


def rerank(
    prompt: Prompt,
    candidates: Sequence[str] | None,
    n: int | None,
    sampling: Mapping[str, Any] | None,
    head: str | None,
    truncate: bool,
    return_token_ids: bool,
    append_to: str | None,
    early_rejection: Mapping[str, Any] | None = None,
    stop_when: Mapping[str, Any] | None = None,
    stream: bool = False,
) -> Call[answers.RerankAnswer]:
    given = {"candidates": candidates and list(candidates), "n": n, "sampling": sampling, "append_to": append_to}
    given |= {"early_rejection": early_rejection, "stop_when": stop_when}
    given |= {"return_token_ids": return_token_ids or None, "stream": stream or None}
    body = {"prompt": prompt if isinstance(prompt, str) else list(prompt), **_given(given), **_options(head, truncate)}
    return Call("POST", "/rerank", lambda value: read(answers.RerankAnswer, value), body, deadline=True, stream=stream)


def heads() -> Call[list[answers.HeadInfo]]:
    return Call("GET", "/heads", lambda value: [read(answers.HeadInfo, head) for head in value["heads"]])


def head(name: str) -> Call[answers.HeadInfo]:
    return Call("GET", f"/heads/{quote(name, safe='')}", lambda value: read(answers.HeadInfo, value))


def activate(name: str, version: int) -> Call[answers.Head]:
    return Call(
        "POST", f"/heads/{quote(name, safe='')}/activate", lambda value: read(answers.Head, value), {"version": version}
    )


def update(name: str, sequence: int, pairs: Iterable[Element], lr: float | None) -> Call[answers.Head]:
    body = {"sequence": sequence, "pairs": [_fields(pair, PAIR) for pair in pairs], **_given({"lr": lr})}
    return Call("POST", f"/heads/{quote(name, safe='')}/update", lambda value: read(answers.Head, value), body)


def policy() -> Call[answers.Policy]:
    return Call("GET", "/policy", lambda value: read(answers.Policy, value))


def load_policy(version: str) -> Call[answers.Policy]:
    return Call("POST", "/policy", lambda value: read(answers.Policy, value), {"version": version})


def sleep() -> Call[bool]:
    return Call("POST", "/sleep", lambda value: bool(value["asleep"]), {})


def wake() -> Call[bool]:
    return Call("POST", "/wake", lambda value: bool(value["asleep"]), {})


def create_job(
    kind: str, rows: Iterable[Element], head: str | None, append_to: str | None, key: str | None
) -> Call[answers.Job]:
    kept = ITEM if kind == "score" else ITEM + PAIR if kind == "reward" else PAIR
    lines = b"".join(json.dumps(_fields(row, kept)).encode() + b"\n" for row in rows)
    params = _given({"kind": kind, "head": head, "append_to": append_to})
    read_job = partial(read, answers.Job)
    return Call("POST", "/jobs", read_job, content=lines, params=params, repeatable=False, key=key)


def job(id: str) -> Call[answers.Job]:
    return Call("GET", f"/jobs/{quote(id, safe='')}", lambda value: read(answers.Job, value))


def cancel_job(id: str) -> Call[answers.Job]:
    return Call("POST", f"/jobs/{quote(id, safe='')}/cancel", lambda value: read(answers.Job, value), {})


def job_results(id: str) -> Call[list[dict[str, Any]]]:
    return Call("GET", f"/jobs/{quote(id, safe='')}/results", list)


def info() -> Call[dict[str, Any]]:
    return Call("GET", "/info", dict)


def health() -> Call[answers.Health]:
    return Call("GET", "/health", lambda value: answers.Health(True, str(value.get("status", ""))))


def _fields(element: Element, known: Sequence[str]) -> dict[str, Any]:
    """What the service takes of a row, so that rows of a dataset can be given as they are (an absent column may be
    None there).
    """
    return {name: element[name] for name in known if element.get(name) is not None}


def _options(head: str | None, truncate: bool, detail: Sequence[str] = ()) -> dict[str, Any]:
    return _given({"head": head, "truncate": truncate or None, "detail": list(detail) or None})


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
