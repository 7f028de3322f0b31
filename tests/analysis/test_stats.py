"""Intervals against scipy, scikit-learn, numbers worked by hand, and their own promise: coverage."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm, sem, spearmanr
from scipy.stats import t as student
from sklearn.metrics import roc_auc_score

from stages.lib.analysis import stats

SETTINGS = {"samples": 1000, "confidence": 0.95, "seed": 0}


def test_auc_worked_example():
    # of the six comparisons of {3, 1} with {0, 1, 2}: 3 wins three; 1 wins one and ties one
    assert stats.auc([3, 1], [0, 1, 2]) == pytest.approx(4.5 / 6)


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=20),
    st.lists(st.integers(-3, 3), min_size=1, max_size=20),
)
def test_auc_agrees_with_scikit_learn(positives, negatives):
    labels = [1] * len(positives) + [0] * len(negatives)
    expected = roc_auc_score(labels, positives + negatives)
    assert stats.auc(positives, negatives) == pytest.approx(expected)
    assert stats.auc(negatives, positives) == pytest.approx(1 - expected)


def test_every_resampled_auc_is_the_auc_of_the_resampled_texts(monkeypatch):
    """The vectorised statistic, ties and clusters included, against scikit-learn with sample weights."""
    rng = np.random.default_rng(1)
    positives, negatives = rng.integers(0, 6, 30), rng.integers(0, 5, 20)
    positive_clusters, negative_clusters = rng.integers(0, 8, 30), 100 + rng.integers(0, 7, 20)
    seen = []

    def spy(estimate, statistic, groups, texts, samples, confidence, seed):
        weights = [stats._resample(np.random.default_rng(2), 5, n) for n in groups]
        seen.append((weights, statistic(*weights)))
        return stats.Interval(estimate, None, None)

    monkeypatch.setattr(stats, "_interval", spy)
    stats.auc_interval(positives, negatives, positive_clusters, negative_clusters, **SETTINGS)
    (weights, found) = seen[0]
    codes = [np.unique(c, return_inverse=True)[1] for c in (positive_clusters, negative_clusters)]
    for i in range(5):
        sample_weight = np.concatenate([weights[0][i][codes[0]], weights[1][i][codes[1]]])
        labels = [1] * 30 + [0] * 20
        scores = np.concatenate([positives, negatives])
        expected = roc_auc_score(labels, scores, sample_weight=sample_weight)
        assert found[i] == pytest.approx(expected)


def test_mean_interval_matches_student_on_normal_data():
    """Independent values, normal: the textbook t interval is exact, and ours lies within 5 % of its width."""
    values = np.random.default_rng(3).normal(5, 2, 40)
    found = stats.mean_interval(values, None, samples=20_000, confidence=0.95, seed=0)
    low, high = student.interval(0.95, 39, loc=values.mean(), scale=sem(values))
    assert found.mean == pytest.approx(values.mean())
    assert [found.low, found.high] == pytest.approx([low, high], abs=0.05 * (high - low))


def test_clusters_widen_the_interval():
    """Every text four times over adds no knowledge: the interval is that of the single texts."""
    values = np.random.default_rng(4).normal(size=50)
    once = stats.mean_interval(values, None, **SETTINGS)
    copies = stats.mean_interval(np.repeat(values, 4), np.repeat(np.arange(50), 4), **SETTINGS)
    naive = stats.mean_interval(np.repeat(values, 4), None, **SETTINGS)
    assert [copies.low, copies.high] == pytest.approx([once.low, once.high])
    assert naive.high - naive.low < 0.6 * (copies.high - copies.low)


def test_mean_is_over_texts_not_over_prompts():
    found = stats.mean_interval([0.0, 0.0, 0.0, 4.0], [7, 7, 7, 9], **SETTINGS)
    assert found.mean == 1.0
    assert (found.low, found.high) == (0.0, 4.0)  # two prompts: a resample may hold either alone


def test_one_prompt_has_no_interval():
    found = stats.mean_interval([1.0, 2.0], [5, 5], **SETTINGS)
    assert found == stats.Interval(1.5, None, None)
    assert found.covers(0)
    assert found.as_metrics("x") == {"x": 1.5, "x_low": None, "x_high": None}


def test_the_seed_decides():
    values = np.random.default_rng(5).normal(size=30)
    first, again = (stats.mean_interval(values, None, **SETTINGS) for _ in range(2))
    other = stats.mean_interval(values, None, 1000, 0.95, seed=1)
    assert first == again != other


def test_chunks_change_nothing(monkeypatch):
    values = np.random.default_rng(6).normal(size=30)
    whole = stats.mean_interval(values, None, **SETTINGS)
    monkeypatch.setattr(stats, "MAX_CHUNK", 1000)
    assert stats.mean_interval(values, None, **SETTINGS) == whole


def test_share_interval_is_wilson_for_independent_texts():
    found = stats.share_interval([1.0] * 30 + [0.0] * 4, None, 0.95)
    expected = binomtest(30, 34).proportion_ci(0.95, method="wilson")
    # the design effect of independent texts is 1 up to (n - 1) / n
    assert [found.low, found.high] == pytest.approx([expected.low, expected.high], abs=0.005)


def test_share_interval_stays_open_when_all_agree():
    expected = binomtest(34, 34).proportion_ci(0.95, method="wilson")
    found = stats.share_interval([1.0] * 34, None, 0.95)
    assert (found.mean, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(expected.low)
    # the same 34 prompts, each counted twice
    twice = stats.share_interval([1.0] * 68, np.repeat(np.arange(34), 2), 0.95)
    assert twice.low == pytest.approx(expected.low)


def test_share_interval_discounts_repeated_prompts():
    values = np.random.default_rng(7).integers(0, 2, 50).astype(float)
    once = stats.share_interval(values, None, 0.95)
    copies = stats.share_interval(np.repeat(values, 3), np.repeat(np.arange(50), 3), 0.95)
    assert [copies.low, copies.high] == pytest.approx([once.low, once.high], abs=0.01)


def test_separated_groups_keep_an_open_auc_interval():
    found = stats.auc_interval(np.arange(150) + 100, np.arange(34), None, None, **SETTINGS)
    assert (found.mean, found.high) == (1.0, 1.0)
    assert 0.85 < found.low < 0.95


def test_share_change_worked_example():
    # 12 gained, 2 lost, of 40: (12.5 - 2.5) / 42 = 0.238; variance (15 - 100 / 42) / 42^2 = 0.00715
    before = [0] * 12 + [1] * 2 + [0] * 26
    after = [1] * 12 + [0] * 2 + [0] * 26
    found = stats.share_change_interval(before, after, 0.95)
    assert found.mean == 0.25
    assert [found.low, found.high] == pytest.approx([0.0723, 0.4039], abs=1e-3)


def test_share_change_stays_open_when_all_or_none_change():
    all_changed = stats.share_change_interval([0] * 30, [1] * 30, 0.95)
    assert (all_changed.mean, all_changed.high) == (1.0, 1.0)
    assert 0.75 < all_changed.low < 0.95
    none_changed = stats.share_change_interval([1] * 30, [1] * 30, 0.95)
    assert none_changed.covers(0.0) and none_changed.low < -0.03 and none_changed.high > 0.03


@pytest.mark.parametrize(("up", "down"), [(0.05, 0.05), (0.3, 0.05), (0.8, 0.02)])
def test_share_change_covers_the_truth(up, down):
    covered = 0
    for repeat in range(400):
        moves = np.random.default_rng(repeat).choice(3, size=34, p=[1 - up - down, up, down])
        found = stats.share_change_interval(moves == 2, moves == 1, 0.95)
        covered += found.covers(up - down)
    assert covered >= 372  # 93 %


def test_rank_correlation_agrees_with_scipy():
    rng = np.random.default_rng(8)
    x = rng.integers(0, 10, 60).astype(float)
    y = x + rng.normal(0, 3, 60)
    found = stats.rank_correlation_interval(x, y, None, **SETTINGS)
    assert found.mean == pytest.approx(spearmanr(x, y).statistic)
    assert found.low < found.mean < found.high
    assert stats.rank_correlation_interval(x, np.ones(60), None, **SETTINGS).covers(0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.mean_interval([], None, **SETTINGS),
        lambda: stats.mean_interval([1.0, float("nan")], None, **SETTINGS),
        lambda: stats.mean_interval([1.0, 2.0], [1], **SETTINGS),
        lambda: stats.share_interval([1.5], None, 0.95),
        lambda: stats.difference_interval([1.0, 2.0], [3.0, 4.0], [1, 2], [2, 3], **SETTINGS),
        lambda: stats.auc_interval([1.0, 2.0], [3.0, 4.0], [1, 2], [2, 3], **SETTINGS),
        lambda: stats.share_change_interval([0, 1], [0.5, 1], 0.95),
        lambda: stats.rank_correlation_interval([1.0, 2.0], [1.0], None, **SETTINGS),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError):
        call()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30), st.integers(0, 100))
def test_interval_lies_within_the_values(values, seed):
    found = stats.mean_interval(values, None, 100, 0.95, seed)
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9


def _planted(rng, effect):
    """Changes of per-token log-prob as in the default run: 150 training and 34 held-out prompts, two texts
    each, skewed, alike within a prompt; `effect` is what training adds."""
    groups = []
    for n in (150, 34):
        prompt = np.repeat(rng.gamma(2.0, 0.1, n), 2)
        groups.append(prompt + rng.normal(0, 0.1, 2 * n))
    train_clusters, heldout_clusters = np.repeat(np.arange(150), 2), np.repeat(np.arange(34), 2) + 1000
    return groups[0] + effect, groups[1], train_clusters, heldout_clusters


@pytest.mark.parametrize(("interval", "no_effect"), [(stats.difference_interval, 0.0), (stats.auc_interval, 0.5)])
def test_without_an_effect_the_interval_covers_it_in_95_percent_of_repeats(interval, no_effect):
    covered = 0
    for repeat in range(200):
        data = _planted(np.random.default_rng(repeat), 0.0)
        covered += interval(*data, samples=1000, confidence=0.95, seed=repeat).covers(no_effect)
    assert 182 <= covered <= 198


def test_a_planted_effect_is_recovered():
    """A difference in differences of 0.3, and the AUC 0.76 of normals one standard deviation apart."""
    covered = covered_auc = 0
    true_auc = norm.cdf(1 / np.sqrt(2))
    for repeat in range(100):
        data = _planted(np.random.default_rng(repeat), 0.3)
        difference = stats.difference_interval(*data, **SETTINGS)
        covered += difference.covers(0.3)
        assert not difference.covers(0.0)
        assert not stats.auc_interval(*data, **SETTINGS).covers(0.5)
        rng = np.random.default_rng(repeat)
        shifted = stats.auc_interval(rng.normal(1, 1, 150), rng.normal(0, 1, 34), None, None, **SETTINGS)
        covered_auc += shifted.covers(true_auc)
    assert covered >= 90
    assert covered_auc >= 90


def test_the_jackknife_of_a_mean_is_students_interval():
    values = np.array([3.0, 1.0, 4.0, 1.0, 5.0, 9.0])
    without = [np.delete(values, i).mean() for i in range(6)]
    found = stats.jackknife_interval(values.mean(), without, 0.95)
    expected = student.interval(0.95, 5, values.mean(), sem(values))
    assert (found.low, found.high) == pytest.approx(expected)
    assert stats.jackknife_interval(2.0, [0.0], 0.95).low is None


def test_percentiles_of_a_mean_are_about_normal():
    values = np.random.default_rng(0).normal(10, 3, 400)
    low, high = stats.percentiles_of_mean(values, None, (5, 95), 4000, seed=1)
    assert (low, high) == pytest.approx((values.mean() - 1.645 * 0.15, values.mean() + 1.645 * 0.15), abs=0.03)
