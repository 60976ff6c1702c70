"""Scores of responses while they are drawn: a head's number at every token, and the pooled one of the tokens so far."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from inward.errors import InvalidField
from inward.heads.base import Head
from inward.heads.pooling import TRAINED, Pool, pooling
from inward.types import Detail, Doubles, Floats, Reading

TOKENS: frozenset[Detail] = frozenset({"tokens"})


def token_scores(head: Head, news: Mapping[int, Floats]) -> dict[int, Doubles]:
    """The head's score at each token of several responses, by their index; NaN where it is not finite.

    Args:
        news: the numbers ``[t, K]`` of its readout.
    """
    if not news:
        return {}
    together_TK = np.concatenate([*news.values()])
    finite_T = np.isfinite(together_TK).all(axis=1)
    scores_T = np.full(len(together_TK), math.nan)
    if finite_T.any():
        good_TK = together_TK[finite_T]
        said = head.score(Reading(good_TK[-1:], (good_TK,)), details=TOKENS).tokens_N
        scores_T[finite_T] = said[0] if said and said[0] else math.nan
    cuts = np.cumsum([len(values_TK) for values_TK in news.values()])[:-1]
    return dict(zip(news, np.split(scores_T, cuts), strict=True))


def running_pool(head: Head, text: str, default: Pool, *, param: str) -> Pool:
    """The pool by which a running score is made: the one that ``text`` names, else the head's own, else ``default``.

    Raises:
        InvalidField: there is no such pool, or it reads numbers that the head does not give.
    """
    own = head.manifest.pool
    if head.manifest.kind == "srr":
        raise InvalidField(
            f"head {head.ref.name!r} ranks whole responses and has no score while one is drawn: name a legend, hybrid "
            "or value head",
            param=param,
        )
    if not text:
        return own or default
    try:
        pool = Pool.parse(text, layer=own.layer if own else None)
    except ValueError:
        raise InvalidField(
            f"there is no pool {text!r}: last, mean, max_ema:alpha=0.5, max_rolling:window=10 and topk:k=10 are some",
            param=param,
        ) from None
    if pool.name in TRAINED and pool != own:
        raise InvalidField(f"head {head.ref.name!r} was not trained for pool {pool.name!r}", param=param)
    return pool


class RunningScore:
    """The pooled score of one response's tokens so far; NaN from the first token on that has no finite score."""

    def __init__(self, pool: Pool) -> None:
        self._pooling = pooling(pool)
        self._trained = pool.name in TRAINED
        self._finite = True
        self.tokens = 0

    def push(self, score: float, values_K: Floats) -> float:
        """Adds a token, of whose numbers a trained pool reads the last."""
        self.tokens += 1
        self._finite = self._finite and math.isfinite(score)
        if not self._finite:
            return math.nan
        logits = np.array([values_K[-1]], dtype=np.float64) if self._trained else None
        self._pooling.push(np.array([score]), logits)
        return self._pooling.value
