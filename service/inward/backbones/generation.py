"""What drawing a response means, whichever engine draws it: what was asked for, and where a response ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from inward.errors import InvalidField
from inward.types import Group, Ids, Sample, SamplingSpec


def sampling_of(group: Group) -> SamplingSpec:
    """How the group's responses are to be drawn.

    Raises:
        InvalidField: it does not say.
    """
    if group.sampling is None:
        raise InvalidField("the group carries no sampling spec", param="sampling")
    return group.sampling


def finished(row: Sequence[int], tokenizer: Any, end_ids: Ids, spec: SamplingSpec) -> Sample:
    """The drawn ids ``row``, cut where they end: before one of ``end_ids``, or before a stop string, which may begin
    within a token: then other ids than the drawn ones are the text before it, if any are. Whatever follows is padding.
    """
    end = next((i for i, token in enumerate(row) if token in end_ids), None)
    ids = list(row[:end])
    text = tokenizer.decode(ids, skip_special_tokens=True)
    cut = min((at for stop in spec.stop if (at := text.find(stop)) >= 0), default=None)
    if cut is None:
        return Sample(tuple(ids), text, "length" if end is None and len(ids) >= spec.max_tokens else "stop")
    # a stop string is no part of the answer, as in vLLM: of a token in which one begins only the text before it is
    given = text[:cut]
    while ids and not given.startswith(tokenizer.decode(ids, skip_special_tokens=True)):
        ids = ids[:-1]
    if rest := given[len(tokenizer.decode(ids, skip_special_tokens=True)) :]:
        for more in _continuations(rest, tokenizer):
            whole = [*ids, *more]
            if len(whole) <= spec.max_tokens and tokenizer.decode(whole, skip_special_tokens=True) == given:
                return Sample(tuple(whole), given, "stop")
    return Sample(tuple(ids), given, "stop")


def _continuations(text: str, tokenizer: Any) -> Iterator[list[int]]:
    """Ids of a text that goes on with another one: as it is, and without the space that some tokenizers put before what
    stands first.
    """
    yield tokenizer(text, add_special_tokens=False)["input_ids"]
    before, ids = (tokenizer(one, add_special_tokens=False)["input_ids"] for one in ("\n", f"\n{text}"))
    yield ids[len(before) :] if ids[: len(before)] == before else []
