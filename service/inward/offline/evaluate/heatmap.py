"""Ten responses of a report, token by token: where the head sees harm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest

import numpy as np

from inward.backbones.base import Backbone
from inward.heads.base import Head
from inward.heads.running import TOKENS
from inward.offline.data.pairs import ResponseList
from inward.prompts import Prompts
from inward.types import Doubles

EXAMPLES = 10
SAFE_RGB, UNSAFE_RGB = "47,111,167", "209,116,42"


@dataclass(frozen=True, slots=True, eq=False)
class TokenScores:
    """One response: its pieces of text and the head's score at each of them."""

    safe: bool
    score: float
    pieces: tuple[str, ...]
    scores_T: Doubles


async def read_examples(
    backbone: Backbone, prompts: Prompts, lists: Sequence[ResponseList], head: Head
) -> tuple[TokenScores, ...]:
    """Token scores of safe and unsafe responses in turns, one of a list; none of a listwise head."""
    if head.manifest.kind == "srr":
        return ()
    found = []
    for one, place in _chosen(lists):
        group = prompts.group(one.prompt, [one.responses[place].text], truncate=True).group
        (reading,) = await backbone.read([group], [head.readout], tokens=True)
        said = head.score(reading.readings[0], details=TOKENS)
        score = said.scores_N[0]
        if said.tokens_N is None or score is None or not len(said.tokens_N[0]):
            continue
        pieces = tuple(
            str(prompts.tokenizer.decode([token], skip_special_tokens=False)) for token in group.responses_ids[0]
        )
        scores_T = np.asarray(said.tokens_N[0], dtype=np.float64)
        found.append(TokenScores(one.responses[place].safe, float(score), pieces, scores_T))
    return tuple(found)


def section(examples: Sequence[TokenScores]) -> str:
    """As HTML: orange where a token scores low, blue where it scores high, within these examples."""
    if not examples:
        return "<p>No token scores: they need texts, a head that is not refitted, and one that scores each token.</p>"
    every = np.concatenate([one.scores_T for one in examples])
    middle = float(np.median(every))
    spread = max(float(np.quantile(np.abs(every - middle), 0.95)), 1e-12)
    shown = "".join(
        f'<p class="tokens"><b>{"safe" if one.safe else "unsafe"}, {one.score:.3f}</b> '
        + "".join(
            _span(piece, (score - middle) / spread) for piece, score in zip(one.pieces, one.scores_T, strict=False)
        )
        + "</p>"
        for one in examples
    )
    return f"{shown}<p>The head's score at every token of {len(examples)} responses: orange is low, blue high.</p>"


def _span(piece: str, strength: float) -> str:
    colour = SAFE_RGB if strength > 0 else UNSAFE_RGB
    return f'<span style="background:rgba({colour},{min(1.0, abs(strength)) * 0.7:.2f})">{escape(piece)}</span>'


def _chosen(lists: Sequence[ResponseList]) -> list[tuple[ResponseList, int]]:
    """Safe and unsafe ones in turns, each from another list, as long as there are any."""
    by_label: dict[bool, list[tuple[ResponseList, int]]] = {True: [], False: []}
    for number, one in enumerate(lists):
        for label in (number % 2 == 0, number % 2 == 1):
            places = [i for i, response in enumerate(one.responses) if response.safe is label]
            if places:
                by_label[label].append((one, places[0]))
                break
    both = zip_longest(by_label[True], by_label[False])
    return [one for pair in both for one in pair if one is not None][:EXAMPLES]
