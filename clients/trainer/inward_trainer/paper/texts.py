"""Conversations as token ids, the same ids that the service scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from inward_client.rows import Pair, Prompt
from inward_trainer.pairs import ScoredPair
from inward_trainer.tokens import Tokeniser

Ids = list[int]


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt, rendered up to where the answer begins, and an answer."""

    prompt_ids: Ids
    answer_ids: Ids

    @property
    def ids(self) -> Ids:
        return self.prompt_ids + self.answer_ids


def encode(tokeniser: Tokeniser, rows: Iterable[tuple[Prompt, str]]) -> list[Text]:
    """Given answers; nothing ends them."""
    return [both[0] for both in encode_pairs(tokeniser, (Pair(prompt, text, "") for prompt, text in rows))]


def encode_pairs(tokeniser: Tokeniser, pairs: Iterable[Pair], *, whole: int = 0) -> list[tuple[Text, Text]]:
    """Chosen and rejected answers of prompts.

    Args:
        whole: an end-of-sequence token follows answers of fewer characters; longer ones were cut, and end nowhere.
    """
    found = []
    for pair in pairs:
        finished = (len(pair.chosen) < whole, len(pair.rejected) < whole)
        tokens = tokeniser(ScoredPair("", pair.prompt, pair.chosen, pair.rejected, finished=finished))
        found.append((Text(tokens.prompt_ids, tokens.chosen_ids), Text(tokens.prompt_ids, tokens.rejected_ids)))
    return found


def prompt_ids(tokeniser: Tokeniser, prompts: Sequence[Prompt]) -> list[Ids]:
    """Of each prompt, up to where the answer begins."""
    return [text.prompt_ids for text in encode(tokeniser, ((prompt, "") for prompt in prompts))]
