"""Each route as a pure value: what is sent, and how the answer is read. The client sends these and nothing else."""

from __future__ import annotations

import json
import math
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


def listed(name: str, elements: Iterable[Element]) -> list[Element]:
    """Rows, or messages, of whatever holds them; ``name`` is for errors.

    Raises:
        TypeError: one of them is no dict.
    """
    found = list(elements)
    for i, element in enumerate(found):
        if not isinstance(element, Mapping):
            raise TypeError(
                f"{name} is a list of dicts, and {name}.{i} is of type {type(element).__name__}; put a single dict in "
                'a list, and of a DataFrame give df.to_dict("records"), or use annotate'
            )
    return found


def encoded(value: Mapping[str, Any]) -> bytes:
    """As JSON; in ASCII, since half a surrogate pair is the service's to refuse, not a crash here.

    Raises:
        ValueError: a number is NaN or infinite, which JSON has not.
    """
    return json.dumps(value, allow_nan=False).encode()


def margin(pairs: Iterable[Element], head: str | None, truncate: bool) -> Call[answers.MarginAnswer]:
    return _scores("/margin", _pairs(pairs) | _options(head, truncate), answers.MarginAnswer)


def score(
    items: Iterable[Element], head: str | None, truncate: bool, detail: Sequence[str]
) -> Call[answers.ScoreAnswer]:
    return _scores("/score", _items(items) | _options(head, truncate, detail), answers.ScoreAnswer)


def reward(
    items: Iterable[Element], head: str | None, truncate: bool, detail: Sequence[str]
) -> Call[answers.RewardAnswer]:
    return _scores("/reward", _items(items) | _options(head, truncate, detail), answers.RewardAnswer)


def reward_pairs(
    pairs: Iterable[Element], head: str | None, truncate: bool, detail: Sequence[str]
) -> Call[answers.RewardPairAnswer]:
    return _scores("/reward", _pairs(pairs) | _options(head, truncate, detail), answers.RewardPairAnswer)


def rerank(
    prompt: Prompt,
    candidates: Iterable[str] | None = None,
    *,
    head: str | None,
    truncate: bool,
    stream: bool = False,
    **given: Any,
) -> Call[answers.RerankAnswer]:
    """``given``: the route's other fields, of which None is not sent."""
    given |= {"candidates": None if candidates is None else _texts("candidates", candidates)}
    body = {
        "prompt": prompt if isinstance(prompt, str) else listed("prompt", prompt),
        **_given(given),
        **_options(head, truncate),
    }
    if stream:
        body["stream"] = True
    return _scores("/rerank", body, answers.RerankAnswer, stream=stream)


def heads() -> Call[list[answers.HeadInfo]]:
    return Call("GET", "/heads", lambda value: [read(answers.HeadInfo, head) for head in value["heads"]])


def head(name: str) -> Call[answers.HeadInfo]:
    return Call("GET", f"/heads/{quote(name, safe='')}", partial(read, answers.HeadInfo))


def activate(name: str, version: int) -> Call[answers.Head]:
    path = f"/heads/{quote(name, safe='')}/activate"
    return Call("POST", path, partial(read, answers.Head), {"version": version})


def update(name: str, sequence: int, pairs: Iterable[Element], lr: float | None) -> Call[answers.Head]:
    body = {"sequence": sequence, **_pairs(listed("pairs", pairs)), **_given({"lr": lr})}
    return Call("POST", f"/heads/{quote(name, safe='')}/update", partial(read, answers.Head), body)


def policy() -> Call[answers.Policy]:
    return Call("GET", "/policy", partial(read, answers.Policy))


def load_policy(version: str) -> Call[answers.Policy]:
    return Call("POST", "/policy", partial(read, answers.Policy), {"version": version})


def sleep() -> Call[bool]:
    return Call("POST", "/sleep", lambda value: bool(value["asleep"]), {})


def wake() -> Call[bool]:
    return Call("POST", "/wake", lambda value: bool(value["asleep"]), {})


def create_job(
    kind: str, rows: Iterable[Element], head: str | None, append_to: str | None, key: str | None
) -> Call[answers.Job]:
    kept = ITEM if kind == "score" else ITEM + PAIR if kind == "reward" else PAIR
    lines = b"".join(encoded(_fields(row, kept)) + b"\n" for row in listed("rows", rows))
    params = _given({"kind": kind, "head": head, "append_to": append_to})
    return Call("POST", "/jobs", partial(read, answers.Job), content=lines, params=params, repeatable=False, key=key)


def job(id: str) -> Call[answers.Job]:
    return Call("GET", f"/jobs/{quote(id, safe='')}", partial(read, answers.Job))


def cancel_job(id: str) -> Call[answers.Job]:
    return Call("POST", f"/jobs/{quote(id, safe='')}/cancel", partial(read, answers.Job), {})


def job_results(id: str) -> Call[list[dict[str, Any]]]:
    return Call("GET", f"/jobs/{quote(id, safe='')}/results", list)


def info() -> Call[dict[str, Any]]:
    return Call("GET", "/info", dict)


def health() -> Call[answers.Health]:
    return Call("GET", "/health", lambda value: answers.Health(True, str(value.get("status", ""))))


def _scores(path: str, body: Mapping[str, Any], kind: type[T], *, stream: bool = False) -> Call[T]:
    return Call("POST", path, partial(read, kind), body, deadline=True, stream=stream)


def _items(items: Iterable[Element]) -> dict[str, Any]:
    return {"items": [_fields(item, ITEM) for item in items]}


def _pairs(pairs: Iterable[Element]) -> dict[str, Any]:
    return {"pairs": [_fields(pair, PAIR) for pair in pairs]}


def _fields(element: Element, known: Sequence[str]) -> dict[str, Any]:
    """What the service takes of a row, so that rows of a dataset can be given as they are."""
    return {name: value for name in known if not _is_absent(value := element.get(name))}


def _is_absent(value: object) -> bool:
    """None, or what a frame has instead: NaN, pandas' NA. Neither is infinity a text."""
    not_finite = isinstance(value, float) and not math.isfinite(value)
    return value is None or not_finite or type(value).__name__ == "NAType"


def _options(head: str | None, truncate: bool, detail: Sequence[str] = ()) -> dict[str, Any]:
    return _given({"head": head, "truncate": truncate or None, "detail": _texts("detail", detail) or None})


def _texts(name: str, texts: Iterable[str]) -> list[str]:
    """Texts of whatever holds them, such as a column of a frame; a single one would be its letters.

    Raises:
        TypeError: it is a single one.
    """
    if isinstance(texts, str):
        raise TypeError(f"{name} is a list of texts, not a text: give [text]")
    return list(texts)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
