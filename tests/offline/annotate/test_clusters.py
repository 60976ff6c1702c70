import numpy as np
import pytest

from inward.offline.annotate.clusters import cluster
from inward.offline.annotate.summary import Picked
from inward_client.rows import Pair


def made(wrong=(0.0, 0.4, 0.1), each=200, width=12):
    """Pairs about three things, of which so many labels are wrong."""
    rng = np.random.default_rng(0)
    pairs, states = [], []
    for topic, share in enumerate(wrong):
        for n in range(each):
            margin = float(abs(rng.normal(2, 1)) + 0.1) * (-1 if rng.random() < share else 1)
            pair = Pair(f"topic {topic}, question {n}", "good", "bad")
            pairs.append(Picked("in", len(pairs) + 1, pair, {"margin": margin, "label_agrees": margin > 0}))
            states.append(8.0 * np.eye(width)[topic] + rng.normal(size=width))
    order = rng.permutation(len(pairs))
    return [pairs[i] for i in order], np.array(states, dtype=np.float32)[order]


def test_wrong_labels_are_found_where_they_gather_with_three_examples_of_there():
    pairs, states = made()
    worst, middle, best = cluster(pairs, states, 3)
    assert [one.pairs for one in (worst, middle, best)] == [200, 200, 200]
    assert worst.noise.wrong.value == pytest.approx(0.4, abs=0.1) and best.contradicted == 0
    assert len(worst.examples) == 3
    assert all("topic 1" in one.pair.prompt and one.columns["margin"] < 0 for one in worst.examples)
    assert len({one.pair.prompt for one in worst.examples}) == 3
    text = "\n".join(worst.text())
    assert "200 pairs" in text and "wrong, estimated" in text and text.count("topic 1") == 3


def test_a_head_that_does_not_judge_estimates_nothing_and_the_same_pairs_give_the_same_clusters():
    pairs, states = made()
    found = cluster(pairs, states, 3, judges=False)
    assert all(one.noise is None and one.to_json()["wrong"] is None for one in found)
    assert [one.to_json() for one in cluster(pairs, states, 3, judges=False)] == [one.to_json() for one in found]


def test_few_pairs_and_equal_states_are_fewer_clusters():
    pairs, states = made(each=2)
    assert cluster(pairs[:1], states[:1], 8) == [] == cluster([], states[:0], 8)
    assert len(cluster(pairs, np.ones_like(states), 8)) == 1
    assert sum(one.pairs for one in cluster(pairs, states, 50)) == 6


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@pytest.mark.parametrize("seed", range(3))
def test_pairs_that_are_nearly_the_same_leave_no_cluster_without_any(seed):
    rng = np.random.default_rng(seed)
    states_ND = rng.normal(size=(3, 64))[rng.integers(0, 3, 200)] + rng.normal(size=(200, 64)) * 1e-6
    pairs = [Picked("in", n, Pair(f"question {n}", "good", "bad"), {"margin": 1.0}) for n in range(200)]
    found = cluster(pairs, states_ND.astype(np.float32), 8)
    assert all(one.pairs for one in found) and sum(one.pairs for one in found) == 200
