"""A judge that sees words only: whatever it tells apart, no model is needed for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from inward.types import Doubles
from inward_client.rows import Prompt
from inward_trainer.paper.data import Answer, conversation


class BagOfWords:
    """TF-IDF of words and pairs of words of the answer, and of its prompt apart, with logistic regression."""

    def __init__(self, rows: Sequence[Answer]) -> None:
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=50_000, min_df=2)
        self._model: Any = make_pipeline(words, LogisticRegression(C=3.0, max_iter=300))
        self._model.fit([_text(row.prompt, row.text) for row in rows], [row.safe for row in rows])

    def logits(self, rows: Sequence[tuple[Prompt, str]]) -> Doubles:
        """``[M]``: positive is safe."""
        return np.asarray(self._model.decision_function([_text(*row) for row in rows]), dtype=np.float64)


def _text(prompt: Prompt, answer: str) -> str:
    """Words of the prompt are other words than the same ones of the answer."""
    return answer + "\n" + " ".join(f"q_{word}" for word in conversation(prompt).split())
