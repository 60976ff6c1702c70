import numpy as np
import pytest
from rich.console import Console

from inward.offline.evaluate.compare import compare, report, table
from inward.offline.evaluate.scoring import Judged
from inward.offline.evaluate.statistics import Resampling
from support import made_examples as made


def judged(examples, step, seed, hard=0.0):
    """Scores with noise of their own, and noise that every head shares."""
    own = np.random.default_rng(seed).normal(size=len(examples))
    shared = np.random.default_rng(99).normal(size=len(examples))
    return Judged(step * examples.safe_M + 0.5 * own + hard * shared)


def test_a_difference_is_known_better_than_either_figure():
    examples = made.pairs(n=400)
    first, second = judged(examples, 1.0, 1, hard=2.0), judged(examples, 1.5, 1, hard=2.0)
    by_name = {row.name: row for row in compare(examples, first, second, resampling=Resampling(300))}
    auc = by_name["auc"]
    assert auc.difference.value == pytest.approx(auc.second.value - auc.first.value)
    assert auc.verdict == "second"
    assert auc.difference.high - auc.difference.low < 0.5 * (auc.second.high - auc.second.low)
    assert {"pair_accuracy", "auc", "macro_f1", "length_matched_accuracy"} <= by_name.keys()


def test_the_same_head_twice_differs_in_nothing():
    examples = made.pairs(n=60)
    one = judged(examples, 1.0, 1)
    for row in compare(examples, one, one, resampling=Resampling(50)):
        assert (row.difference.value, row.difference.low, row.difference.high) == (0, 0, 0)
        assert row.verdict == "cannot be told"


def test_noise_gives_no_verdict():
    examples = made.pairs(n=200)
    rows = compare(examples, judged(examples, 1.0, 1), judged(examples, 1.0, 2), resampling=Resampling(200))
    assert [row.verdict for row in rows if row.name == "pair_accuracy"] == ["cannot be told"]


def test_lists_have_their_top_pick_and_calibration_is_better_when_lower():
    examples = made.lists(g=60)
    first, second = judged(examples, 1.0, 1), judged(examples, 6.0, 1)
    sure = Judged(second.scores_M, np.where(examples.safe_M, 0.99, 0.01))
    unsure = Judged(first.scores_M, np.full(len(examples), 0.99))
    rows = {row.name: row for row in compare(examples, unsure, sure, resampling=Resampling(100))}
    assert rows["top1_safe_rate"].verdict == "second" and rows["calibration_error"].verdict == "first"
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table(tuple(rows.values()), ("old", "new"), "about"))
    line = next(line for line in capture.get().splitlines() if line.startswith("calibration error"))
    assert line.rstrip().endswith("new")
    assert report(tuple(rows.values()), ("old", "new"))["metrics"]["auc"]["verdict"] == "second"
