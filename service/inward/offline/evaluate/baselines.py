"""What a head has to beat. Those that need fitting are fitted by cross-validation on the very rows that are judged,
by prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from inward.offline.data.pairs import Folds
from inward.offline.evaluate.examples import Examples
from inward.offline.evaluate.layerwise import Layerwise, cross_validate, logistic, mean_difference
from inward.offline.evaluate.scoring import Judged
from inward.types import Doubles, Floats, Indices

TFIDF_C = 3.0


@dataclass(frozen=True, slots=True)
class Baseline:
    """One baseline's judgement and what to know about it."""

    name: str
    about: str
    judged: Judged
    forward: bool
    """Whether it needs a forward pass of the backbone, as a head does."""


def baselines(
    examples: Examples, folds: Folds, *, layer: int | None = None, seed: int = 0, progress: bool = False
) -> list[Baseline]:
    """Every baseline that the input allows.

    Args:
        layer: for lists, the layer at which the linear and the MLP scorer read (a listwise head's own); None: the
            deepest.
    """
    difference, probes = (
        cross_validate(examples, folds, probe, progress=progress) for probe in (mean_difference, logistic)
    )
    found = [
        *_length(examples, folds),
        Baseline("mean_difference", f"mean difference, best layer ({_chosen(difference)})", difference.best(), True),
        Baseline("logistic_probe", f"one logistic probe, best layer ({_chosen(probes)})", probes.best(), True),
    ]
    if examples.text_M is not None:
        words = _tfidf(examples, examples.text_M, folds)
        found.append(Baseline("tfidf_logistic", "TF-IDF + logistic on the text", words, False))
    if examples.stable_rank_M is not None:
        ranks = Judged(examples.stable_rank_M)
        found.append(Baseline("stable_rank", "stable rank, untrained (2512.02807)", ranks, True))
    if examples.mixed:
        at = examples.layers[-1] if layer is None else layer
        found.append(Baseline("linear_scorer", f"linear scorer, layer {at}", Judged(probes.at(at)), True))
        found.append(Baseline("mlp_scorer", f"MLP scorer, layer {at}", _mlp(examples, folds, at, seed), True))
    return found


def stable_rank(tokens_TD: Floats) -> float:
    """Squared Frobenius over squared spectral norm of a response's token states (arXiv 2512.02807); 0 of an empty
    response.
    """
    x = tokens_TD.astype(np.float64)
    if not x.size or not x.any():
        return 0.0
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    return float(np.trace(gram) / np.linalg.eigvalsh(gram)[-1])


def _length(examples: Examples, folds: Folds) -> Iterator[Baseline]:
    """Longer is better, or shorter: whichever holds in the training folds."""
    if examples.length_difference_P is None or not len(examples.pairs_P2):
        return
    sign_M = np.ones(len(examples))
    for train, held_out in folds:
        inside = np.isin(examples.pairs_P2[:, 0], train)
        sign_M[held_out] = 1.0 if np.sign(examples.length_difference_P[inside]).sum() >= 0 else -1.0
    if examples.length_M is not None:
        judged = Judged(sign_M * examples.length_M)
    else:
        judged = Judged(None, margin_P=sign_M[examples.pairs_P2[:, 0]] * examples.length_difference_P)
    yield Baseline("length", "length", judged, False)


def _tfidf(examples: Examples, text_M: tuple[str, ...], folds: Folds) -> Judged:
    scores_M, probability_M = np.zeros(len(examples)), np.full(len(examples), 0.5)
    for train, held_out in folds:
        if not _both_classes(examples, train):
            continue
        words = TfidfVectorizer(
            ngram_range=(1, 2), sublinear_tf=True, max_features=50_000, token_pattern=r"(?u)\b\w+\b"
        )
        try:
            model = make_pipeline(words, LogisticRegression(C=TFIDF_C, max_iter=500))
            model.fit([text_M[i] for i in train], examples.safe_M[train])
        except ValueError:  # no words at all in the training texts
            continue
        scores_M[held_out] = model.decision_function([text_M[i] for i in held_out])
        probability_M[held_out] = model.predict_proba([text_M[i] for i in held_out])[:, 1]
    return Judged(scores_M, probability_M)


def _mlp(examples: Examples, folds: Folds, layer: int, seed: int) -> Judged:
    """One hidden layer of 64 on the vectors of prompt and candidate, each candidate by itself."""
    axis = examples.layers.index(layer)
    features_MF = examples.states_MLD[:, axis]
    if examples.prompt_states_GLD is not None:
        features_MF = np.concatenate([examples.prompt_states_GLD[examples.list_M, axis], features_MF], axis=1)
    scores_M: Doubles = np.zeros(len(examples))
    for train, held_out in folds:
        if not _both_classes(examples, train):
            continue
        components = PCA(min(128, len(train) - 1, features_MF.shape[1]), whiten=False, random_state=seed)
        model = make_pipeline(
            StandardScaler(),
            components,
            MLPClassifier((64,), alpha=1.0, max_iter=300, tol=1e-3, n_iter_no_change=5, random_state=seed),
        )
        model.fit(features_MF[train], examples.safe_M[train])
        probability = model.predict_proba(features_MF[held_out])[:, 1]
        scores_M[held_out] = np.log(np.maximum(probability, 1e-12)) - np.log(np.maximum(1 - probability, 1e-12))
    return Judged(scores_M)


def _both_classes(examples: Examples, rows: Indices) -> bool:
    return 0 < int(examples.safe_M[rows].sum()) < len(rows)


def _chosen(layerwise: Layerwise) -> str:
    return "/".join(str(layer) for layer in sorted(set(layerwise.chosen)))
