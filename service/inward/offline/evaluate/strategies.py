"""What would be had from one layer alone: best, last, random and worst layer beside the head (arXiv 2503.10093,
figure 6).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from inward.offline.evaluate import statistics
from inward.offline.evaluate.examples import Examples
from inward.offline.evaluate.metrics import picked, wins
from inward.offline.evaluate.scoring import Judged
from inward.offline.evaluate.statistics import Estimate, Statistic, bootstrap
from inward.types import Doubles, Indices


@dataclass(frozen=True, slots=True)
class Strategy:
    """One way to choose; ``layer`` is None where it is not a single layer."""

    name: str
    layer: int | None
    estimate: Estimate


def metric_of(examples: Examples) -> str:
    """What strategies are compared by: top-1 safe rate of lists, else pair accuracy, else AUC."""
    return "top1_safe_rate" if examples.mixed else "pair_accuracy" if len(examples.pairs_P2) else "auc"


def strategies(examples: Examples, ours: Judged, layers: Judged, *, resamples: int, seed: int) -> tuple[Strategy, ...]:
    """Best and worst layer are chosen with hindsight, on the very responses that are judged: bounds, not methods.

    Args:
        ours: the head.
        layers: has each layer's own scores.
    """
    if ours.scores_M is None or layers.layer_scores_LM is None or len(np.unique(_items(examples))) < 2:
        return ()
    each = [_statistic(examples, scores_M) for scores_M in layers.layer_scores_LM]
    once = np.ones((1, len(_items(examples))))
    value_L = np.array([float(one(once)[0]) for one in each])
    last, best, worst = int(np.argmax(layers.layers)), int(value_L.argmax()), int(value_L.argmin())
    candidates: list[tuple[str, int | None, Statistic]] = [
        ("best layer", layers.layers[best], each[best]),
        ("ours", None, _statistic(examples, ours.scores_M)),
        ("last layer", layers.layers[last], each[last]),
        ("random layer", None, lambda weights_BN: np.mean([one(weights_BN) for one in each], axis=0)),
        ("worst layer", layers.layers[worst], each[worst]),
    ]
    estimates = [bootstrap(one, _items(examples), resamples=resamples, seed=seed) for _, _, one in candidates]
    return tuple(
        Strategy(name, layer, estimate)
        for (name, layer, _), estimate in zip(candidates, estimates, strict=True)
        if estimate is not None
    )


def _items(examples: Examples) -> Indices:
    """The prompt of everything that counts once."""
    match metric_of(examples):
        case "top1_safe_rate":
            return np.array([examples.prompt_M[rows[0]] for rows in examples.mixed], dtype=np.int64)
        case "pair_accuracy":
            return examples.prompt_P
        case _:
            return examples.prompt_M


def _statistic(examples: Examples, scores_M: Doubles) -> Statistic:
    match metric_of(examples):
        case "top1_safe_rate":
            return statistics.mean(picked(examples, scores_M))
        case "pair_accuracy":
            return statistics.mean(wins(Judged(scores_M).margins(examples)))
        case _:
            return statistics.auc(scores_M, examples.safe_M)
