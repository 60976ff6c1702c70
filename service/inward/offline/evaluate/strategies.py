"""What would be had from one layer alone: best, last, random and worst layer beside the head (arXiv 2503.10093,
figure 6).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from inward.offline.evaluate.examples import Examples
from inward.offline.evaluate.metrics import statistics_of
from inward.offline.evaluate.scoring import Judged
from inward.offline.evaluate.statistics import Estimate, Resampling, Statistic


@dataclass(frozen=True, slots=True)
class Strategy:
    """One way to choose; ``layer`` is None where it is not a single layer."""

    name: str
    layer: int | None
    estimate: Estimate


def metric_of(examples: Examples) -> str:
    """What strategies are compared by: top-1 safe rate of lists, else pair accuracy, else AUC."""
    return "top1_safe_rate" if examples.mixed else "pair_accuracy" if len(examples.pairs_P2) else "auc"


def strategies(examples: Examples, ours: Judged, layers: Judged, resampling: Resampling) -> tuple[Strategy, ...]:
    """Best and worst layer are chosen with hindsight, on the very responses that are judged: bounds, not methods.

    Args:
        ours: the head.
        layers: has each layer's own scores.
    """
    if ours.scores_M is None or layers.layer_scores_LM is None:
        return ()
    metric = metric_of(examples)
    whole, prompts = statistics_of(examples, Judged(ours.scores_M))[metric]()
    each = [statistics_of(examples, Judged(scores_M))[metric]()[0] for scores_M in layers.layer_scores_LM]
    once = np.ones((1, len(prompts)))
    value_L = np.array([float(one(once)[0]) for one in each])
    last, best, worst = int(np.argmax(layers.layers)), int(value_L.argmax()), int(value_L.argmin())
    candidates: list[tuple[str, int | None, Statistic]] = [
        ("best layer", layers.layers[best], each[best]),
        ("ours", None, whole),
        ("last layer", layers.layers[last], each[last]),
        ("random layer", None, lambda weights_BN: np.mean([one(weights_BN) for one in each], axis=0)),
        ("worst layer", layers.layers[worst], each[worst]),
    ]
    estimates = ((name, layer, resampling.estimate(one, prompts)) for name, layer, one in candidates)
    return tuple(Strategy(name, layer, estimate) for name, layer, estimate in estimates if estimate is not None)
