"""What the figures of a report mean, in plain words: one paragraph, and what would help.

The limits are rules of thumb, and stand here so that they can be disputed; what is compared is compared with a paired
bootstrap over prompts, and what can't be told is said to be so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from inward.offline.evaluate.compare import Difference, compare
from inward.offline.evaluate.judge import Judgement
from inward.offline.evaluate.statistics import USUAL, Resampling

CALIBRATED = 0.05
"""Most expected calibration error of a probability that is taken at its word."""
MARGINS = 0.65
"""Least pair accuracy for margins: below it a third of them and more point the wrong way."""
FILTERING = 0.80
"""Least pair accuracy for dropping or flipping labels without looking: below it a head contradicts more right labels
than wrong ones wherever fewer than a fifth of the labels are wrong."""
BEST_OF_N = 0.70
"""Least AUC across answers for picking the best of several."""
LENGTH = 0.3
"""Rank correlation of margin and length from which a head is said to go by length."""
RIVALS = {"length": "length", "tfidf_logistic": "a bag of words"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Sentences."""

    doubt: tuple[str, ...]
    """Whether the figures say anything."""
    better: tuple[str, ...]
    """Than what."""
    good_for: tuple[str, ...]
    helps: tuple[str, ...]

    @property
    def paragraph(self) -> str:
        """All of it."""
        return " ".join((*self.doubt, *self.better, *self.good_for, *self.helps))


def verdict(judgement: Judgement, resampling: Resampling = USUAL) -> Verdict:
    """Of a judgement; what it has no figures of is left out."""
    beside = {name: judgement.baselines[name][0].judged for name in RIVALS if name in judgement.baselines}
    rivals = {
        name: _first(compare(judgement.examples, judged, judgement.ours, resampling)) for name, judged in beside.items()
    }
    seen = judgement.seen
    doubt = (f"{seen}: these figures say nothing about other texts.",) if seen and seen.substantial else ()
    good_for = () if doubt else tuple(_good_for(judgement))
    better = tuple(_better(judgement, rivals, trusted=not doubt))
    return Verdict(doubt, better, good_for, tuple(_helps(judgement, rivals)))


def _first(found: tuple[Difference, ...]) -> Difference | None:
    """Pair accuracy where there are pairs, else AUC."""
    by_name = {one.name: one for one in found}
    return by_name.get("pair_accuracy") or by_name.get("auc")


def _better(judgement: Judgement, rivals: dict[str, Difference | None], *, trusted: bool) -> Iterator[str]:
    main = judgement.metrics.get("pair_accuracy") or judgement.metrics.get("auc")
    if main is None:
        return
    does = (
        f"The head ranks {main.value:.0%} of the pairs right"
        if judgement.metrics.get("pair_accuracy")
        else f"The head puts an acceptable answer above another one in {main.value:.0%} of cases"
    )
    chance = "better" if main.low > 0.5 else "worse" if main.high < 0.5 else "not shown to be better"
    yield f"{does} ({main.low:.0%} to {main.high:.0%}): {chance} than chance."
    for name, difference in rivals.items():
        if difference is not None:
            told = {"second": "better than", "first": "worse than"}.get(
                difference.verdict, "not shown to be better than"
            )
            by = difference.difference
            yield f"It is {told} {RIVALS[name]} (difference {by.value:+.2f}, {by.low:+.2f} to {by.high:+.2f})."
    error = judgement.metrics.get("calibration_error")
    if error is not None and (trusted or error.value > CALIBRATED):
        fit = "can" if error.value <= CALIBRATED else "can't"
        yield f"Its probabilities {fit} be taken at their word (calibration error {error.value:.2f})."


def _good_for(judgement: Judgement) -> Iterator[str]:
    accuracy, auc = judgement.metrics.get("pair_accuracy"), judgement.metrics.get("auc")
    uses = [
        ("dropping or flipping labels without a look", accuracy, FILTERING),
        ("margins and confidences in training", accuracy, MARGINS),
        ("picking the best of several answers", auc, BEST_OF_N),
    ]
    known = [(use, value.low >= least, value.high >= least) for use, value, least in uses if value is not None]
    if good := [use for use, sure, _ in known if sure]:
        yield f"Good enough for {_and(good)}."
    if maybe := [use for use, sure, possible in known if possible and not sure]:
        yield f"Perhaps good enough for {_and(maybe)}: more rows would tell."
    if poor := [use for use, _, possible in known if not possible]:
        yield f"Not good enough for {_and(poor)}."


def _helps(judgement: Judgement, rivals: dict[str, Difference | None]) -> Iterator[str]:
    metrics = judgement.metrics
    if (length := metrics.get("spearman_length")) is not None and abs(length.value) >= LENGTH:
        yield f"Its margins go with length ({length.value:+.2f}): fit on pairs of matched lengths, or on other data."
    words = rivals.get("tfidf_logistic")
    if words is not None and words.verdict != "second":
        yield "More pairs to fit on, or a larger backbone, would help: words alone do as much."
    if (error := metrics.get("calibration_error")) is not None and error.value > CALIBRATED:
        yield "Fit the calibration on rows like these before you use its probabilities."
    accuracies = [(row["probe_accuracy"] or 0.0, row["layer"]) for row in judgement.layers]
    best = max(accuracies, default=(0.0, 0))
    accuracy = metrics.get("pair_accuracy")
    if accuracy is not None and best[0] > accuracy.high:
        yield f"A probe fitted on these rows at layer {best[1]} does better ({best[0]:.0%}): refit the head on such."


def _and(some: list[str]) -> str:
    return some[0] if len(some) == 1 else f"{', '.join(some[:-1])} and {some[-1]}"
