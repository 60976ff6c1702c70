"""What drawing a response means, whichever engine draws it: what was asked for, and where a response ends."""

from __future__ import annotations

from collections.abc import Sequence
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
    """The drawn ids ``row``, cut where they end: before one of ``end_ids``, or before a stop string. Whatever follows
    is padding.
    """
    end = next((i for i, token in enumerate(row) if token in end_ids), None)
    ids = list(row[:end])
    text = tokenizer.decode(ids, skip_special_tokens=True)
    cut = min((at for stop in spec.stop if (at := text.find(stop)) >= 0), default=None)
    if cut is None:
        return Sample(tuple(ids), text, "length" if end is None and len(ids) >= spec.max_tokens else "stop")
    # a stop string is no part of the answer, as in vLLM: the ids end with the last token that is wholly before it
    while ids and len(tokenizer.decode(ids, skip_special_tokens=True)) > cut:
        ids = ids[:-1]
    return Sample(tuple(ids), text[:cut], "stop")
