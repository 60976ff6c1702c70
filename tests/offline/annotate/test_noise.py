import numpy as np
import pytest

from inward.offline.annotate.noise import agreement, confident, noise, out_of_fold, slope


def pairs(n, share, seed, sharpness=1.5):
    """Margins in favour of labels that a logistic judge gave, some of them turned round; and which."""
    rng = np.random.default_rng(seed)
    true_N = rng.normal(0, 1.5, n)
    right_N = rng.random(n) < 1 / (1 + np.exp(-sharpness * true_N))
    margin_N = np.where(right_N, true_N, -true_N)
    wrong_N = rng.random(n) < share
    return np.where(wrong_N, -margin_N, margin_N), wrong_N


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_the_share_of_wrong_labels_is_found_and_is_in_its_interval(share):
    margin_N, wrong_N = pairs(4000, share, seed=1)
    found = noise(margin_N, np.arange(4000) // 2, resamples=100)
    assert found.wrong.value == pytest.approx(wrong_N.mean(), abs=0.05)
    assert found.wrong.low <= wrong_N.mean() <= found.wrong.high


def test_confident_learning_takes_a_weak_judges_errors_for_wrong_labels_and_the_curve_does_not():
    margin_N, _ = pairs(4000, 0.0, seed=2, sharpness=0.8)
    found = noise(margin_N, np.arange(4000), resamples=50)
    assert found.flagged.value > 0.1 > found.wrong.value


def test_the_posterior_tells_the_judges_own_errors_from_wrong_labels():
    margin_N, wrong_N = pairs(4000, 0.2, seed=3)
    found = noise(margin_N, np.arange(4000), resamples=50)
    against_N = margin_N < 0
    assert found.posterior(margin_N[against_N]).sum() == pytest.approx((wrong_N & against_N).sum(), rel=0.25)
    assert found.posterior(np.array([-9.0]))[0] > 0.9 > 0.1 > found.posterior(np.array([9.0]))[0]


def test_a_judge_that_is_against_most_labels_and_few_prompts_give_no_estimate():
    margin_N, _ = pairs(500, 0.0, seed=4)
    assert noise(-margin_N, np.arange(500)) is None
    assert noise(margin_N, np.arange(500) % 10) is None


def test_a_probability_does_not_depend_on_the_label_of_its_own_prompt():
    margin_N, _ = pairs(200, 0.1, seed=5)
    group_N = np.arange(200)
    before = out_of_fold(margin_N, group_N)
    turned = margin_N.copy()
    turned[7] = -turned[7]
    assert out_of_fold(turned, group_N)[7] == pytest.approx(1 - before[7])


def test_a_slope_is_that_of_a_logistic_regression_without_intercept():
    from sklearn.linear_model import LogisticRegression

    margin_N, _ = pairs(500, 0.1, seed=6)
    both = np.concatenate([margin_N, -margin_N])[:, None]
    model = LogisticRegression(C=1e6, fit_intercept=False, tol=1e-8).fit(both, np.repeat([1, 0], 500))
    assert slope(margin_N) == pytest.approx(float(model.coef_[0, 0]), rel=1e-3)
    assert slope(-margin_N) == 0.0 == slope(np.zeros(3))


def test_a_weak_judge_calls_no_label_wrong_that_it_does_not_contradict():
    flat = 0
    for seed in range(40):
        margin_N = np.random.default_rng(seed).normal(0.05, 1, 60)
        p_N = out_of_fold(margin_N, np.arange(60))
        flat += bool((p_N == 0.5).any())
        assert confident(p_N, np.ones((1, 60)))[0] <= np.mean(margin_N <= 0)
    assert flat  # some of its curves say one half of every label


@pytest.mark.filterwarnings("ignore")
def test_the_count_of_confident_learning_is_cleanlabs():
    count = pytest.importorskip("cleanlab.count")
    margin_N, _ = pairs(600, 0.2, seed=7)
    p_N = out_of_fold(margin_N, np.arange(600))
    shown = np.concatenate([np.stack([p_N, 1 - p_N], 1), np.stack([1 - p_N, p_N], 1)])  # both ways round
    theirs = count.num_label_issues(np.repeat([0, 1], 600), shown) / 1200
    assert confident(p_N, np.ones((1, 600)))[0] == pytest.approx(theirs, abs=1e-9)


def test_an_interval_of_a_million_pairs_is_made_of_some_of_them():
    margin_N, _ = pairs(1_000_000, 0.1, seed=8)
    found = noise(margin_N, np.arange(1_000_000), resamples=20)
    assert found.wrong.value == pytest.approx(0.1, abs=0.04)


@pytest.mark.parametrize("prompts", [25, 200])
def test_many_pairs_of_few_prompts_give_an_estimate_of_some_of_each(prompts):
    margin_N, _ = pairs(100_001, 0.1, seed=9)
    group_N = np.arange(100_001) % prompts
    assert noise(margin_N, group_N, resamples=20).wrong.value == pytest.approx(0.1, abs=0.04)


@pytest.mark.parametrize("prompts", [1, 2, 25])
def test_many_pairs_of_few_prompts_are_not_too_many(prompts):
    margin_N, _ = pairs(100_001, 0.1, seed=9)
    lone_N = np.maximum(np.arange(100_001) - 100_001 + prompts, 0)  # all but these are of one prompt
    assert (noise(margin_N, lone_N, resamples=20) is None) == (prompts < 20)
    assert (agreement(margin_N, lone_N) is None) == (prompts == 1)
