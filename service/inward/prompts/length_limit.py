"""Whether a prompt and its responses are too long for the model, and what is cut if they may be cut."""

from __future__ import annotations

from dataclasses import dataclass

from inward.errors import TooLarge
from inward.types import Group, Ids

CUTS = 16
"""Different lengths at most to which the prompt of responses that are judged each by itself is cut."""


@dataclass(frozen=True, slots=True)
class Grouped:
    """A group ready for the queue, and whether text had to be cut for it."""

    group: Group
    truncated: bool = False
    whole: Group | None = None
    """What it was before it was cut."""


def fit_length(group: Group, max_tokens: int, *, bos: Ids, truncate: bool, reserve: int = 0) -> Grouped:
    """The group as it is, or cut until the longest of its texts and one EOS are at most ``max_tokens``.

    The oldest tokens of the prompt are cut (never its ``bos``), the same for all responses; a response that would leave
    the prompt less than a quarter of the room loses its end. Where text may be cut, a response of ``reserve`` tokens
    that is still to be drawn has its place, too.

    Raises:
        TooLarge: it is longer, and ``truncate`` is off.
    """
    room = max_tokens - 1  # one EOS
    prompt_ids, responses_ids = group.prompt_ids, group.responses_ids
    longest = max(map(len, responses_ids), default=0)
    drawn = reserve if truncate else 0
    if len(prompt_ids) + max(longest, drawn) <= room:
        return Grouped(group)
    if not truncate:
        worst = max(range(len(responses_ids)), key=lambda i: len(responses_ids[i]), default=0)
        raise TooLarge(
            f"prompt ({len(prompt_ids)} tokens) and response ({longest}) are longer than the {room} tokens that the "
            'model takes; shorten them, or send "truncate": true',
            param=f"responses.{worst}" if responses_ids else "prompt",
        )
    kept = bos if prompt_ids[:1] == bos else ()
    least = min(len(prompt_ids), room // 4)  # of the prompt, so that a long response never stands without one
    responses_ids = tuple(ids[: room - least] for ids in responses_ids)
    rest = prompt_ids[len(kept) :]
    left = room - len(kept) - max((min(drawn, room - least), *map(len, responses_ids)))
    return Grouped(Group(kept + rest[max(0, len(rest) - left) :], responses_ids), truncated=True, whole=group)


def fit_each(group: Group, max_tokens: int, *, bos: Ids) -> list[tuple[tuple[int, ...], Grouped]]:
    """The responses that fit with the whole prompt, and the others by the prompt that they leave room for: each with
    their places in ``group``. What is cut for one depends on its own length alone, in steps, so that few prompts have
    to be computed.
    """
    room = max_tokens - 1
    step = max(1, room // CUTS)
    places: dict[int, list[int]] = {}
    for i, ids in enumerate(group.responses_ids):
        whole = len(group.prompt_ids) + len(ids) <= room
        steps = 0 if whole else min(CUTS, max(1, -(-len(ids) // step)))  # longer ones lose their end
        places.setdefault(steps * step, []).append(i)
    return [
        (tuple(own), fit_length(
            Group(group.prompt_ids, tuple(group.responses_ids[i] for i in own)),
            max_tokens, bos=bos, truncate=True, reserve=reserve,
        ))
        for reserve, own in places.items()
    ]  # fmt: skip
