"""Numbers of the drift monitor against independent references: scipy, scikit-learn, copied rows, and simulation."""

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from rlalign.calibration.calibrators import IdentityCalibrator, IsotonicCalibrator, Support
from rlalign.calibration.drift import DriftMonitor
from rlalign.calibration.drift.judgement import Judged, ece_and_auroc, gap, kish, mean_interval, shift
from rlalign.calibration.metrics import bootstrap_ci, expected_calibration_error


def judged(p, y, *, weight=None, cluster=None) -> Judged:
    p, y = np.asarray(p, float), np.asarray(y, float)
    zeros = np.zeros(len(p), int)
    weight = np.ones(len(p)) if weight is None else np.asarray(weight, float)
    cluster = np.arange(len(p)) if cluster is None else np.asarray(cluster)
    return Judged(p_N=p, y_N=y, weight_N=weight, cluster_N=cluster, step_N=zeros, version_N=zeros)


def interval(found) -> tuple[float, float, float]:
    return found.value, found.low, found.high


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def test_rows_of_their_own_have_the_t_interval(random):
    values = random.normal(0.3, 1, 40)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = mean_interval(values, np.ones(40), np.arange(40))
    assert interval(found) == pytest.approx((values.mean(), *expected), rel=1e-12)


def test_clusters_of_one_size_have_the_t_interval_of_their_means(random):
    cluster = np.repeat(np.arange(12), 8)
    values = random.normal(size=12)[cluster] + random.normal(size=96)
    means = values.reshape(12, 8).mean(1)
    expected = stats.ttest_1samp(means, 0).confidence_interval(0.9)
    found = mean_interval(values, np.full(96, 0.3), cluster, level=0.9)
    assert interval(found) == pytest.approx((means.mean(), *expected), rel=1e-12)


def test_a_weight_of_two_is_the_row_twice_in_its_cluster(random):
    values, cluster = random.normal(size=30), np.arange(30) % 10
    times = random.integers(1, 4, 30)
    copied = mean_interval(np.repeat(values, times), np.ones(times.sum()), np.repeat(cluster, times))
    assert interval(mean_interval(values, times.astype(float), cluster)) == pytest.approx(interval(copied))


def test_the_gap_covers_the_truth_as_often_as_it_says(random):
    hit = 0
    for _ in range(400):
        difficulty = np.repeat(random.normal(0, 1.5, 40), 8)  # of 40 prompts, unseen by the score
        p = expit(random.normal(0, 1, 320))
        y = random.random(320) < expit(np.log(p / (1 - p)) + difficulty)
        truth = 0.0  # symmetric in difficulty and score
        found = gap(judged(p, y, cluster=np.repeat(np.arange(40), 8)))
        hit += found.low <= truth <= found.high
    assert 0.92 <= hit / 400 <= 0.98


def test_agreement_by_luck_is_not_certainty():
    found = gap(judged(np.full(50, 0.9), np.ones(50)))
    assert found.value == pytest.approx(-0.1) and found.high - found.low > 2 * 1.9 * np.sqrt(0.09 / 50)


def test_weights_undo_that_labels_were_picked_by_score(random):
    logits = random.normal(0, 2, 40_000)
    labels = (random.random(40_000) < expit(0.3 * logits)).astype(float)  # flatter than the identity promises
    truth = (expit(logits) - labels).mean()
    chance = np.where(logits > 1, 0.2, 0.01)
    picked = random.random(40_000) < chance
    monitors = [DriftMonitor(IdentityCalibrator(), window=5000) for _ in range(2)]
    monitors[0].update(logits[picked], labels[picked], step=0)
    monitors[1].update(logits[picked], labels[picked], step=0, weight=1 / chance[picked])
    plain, weighted = (m.report().labels for m in monitors)
    assert plain.gap.low > truth + 0.1
    assert weighted.gap.low < truth < weighted.gap.high
    assert weighted.effective == pytest.approx(kish(1 / chance[picked])) and weighted.effective < weighted.rows


def test_ece_is_the_debiased_metric_and_its_range_that_of_copied_rows(random):
    p = random.random(300)
    y = (random.random(300) < p**2).astype(float)
    ece, _ = ece_and_auroc(judged(p, y), bins=15, seed=0)

    def metric(p_N, y_N):
        return expected_calibration_error(p_N, y_N, debias=True)

    copied = bootstrap_ci(metric, p, y, n_resamples=600, method="basic")
    assert ece.value == pytest.approx(copied.value, abs=1e-12)
    assert interval(ece)[1:] == pytest.approx((max(copied.low, 0), copied.high), abs=0.012)


@pytest.mark.parametrize("clustered", [False, True])
def test_one_resample_is_the_metric_on_copied_rows(random, clustered, monkeypatch):
    from rlalign.calibration.drift import judgement

    monkeypatch.setattr(judgement, "DRAWS", 1)
    p, weight = random.random(80), random.uniform(0.5, 2, 80)
    y = (random.random(80) < p).astype(float)
    cluster = np.arange(80) // 4 if clustered else np.arange(80)
    ece, area = ece_and_auroc(judged(p, y, weight=weight, cluster=cluster), bins=10, seed=3)
    drawn = np.random.default_rng(3).integers(cluster.max() + 1, size=cluster.max() + 1)
    index = np.concatenate([np.flatnonzero(cluster == c) for c in drawn])
    once = expected_calibration_error(p[index], y[index], n_bins=10, debias=True, sample_weight=weight[index])
    assert ece.low == pytest.approx(max(2 * ece.value - once, 0), abs=1e-12)
    assert area.low == pytest.approx(roc_auc_score(y[index], p[index], sample_weight=weight[index]), abs=1e-12)


def test_auroc_is_scikit_learns_with_ties_and_weights(random):
    p, weight = np.round(random.random(400), 1), random.uniform(0, 3, 400)
    y = (random.random(400) < p).astype(float)
    _, area = ece_and_auroc(judged(p, y, weight=weight), bins=15, seed=0)
    assert area.value == pytest.approx(roc_auc_score(y, p, sample_weight=weight), abs=1e-12)
    assert area.low < area.value < area.high
    assert ece_and_auroc(judged(p, np.r_[np.ones(9), np.zeros(391)]), bins=15, seed=0)[1] is None


def support_of(logits, weight=None) -> tuple[Support, float]:
    weight = np.ones(len(logits)) if weight is None else weight
    return Support.of(logits, weight), kish(weight)


def psi(now, then) -> float:
    edges = np.quantile(then, np.linspace(0, 1, 11))[1:-1]
    shares = [(np.bincount(np.searchsorted(edges, x), minlength=10) + 0.5) / (len(x) + 5) for x in (now, then)]
    return float(((shares[0] - shares[1]) * np.log(shares[0] / shares[1])).sum())


def test_psi_is_its_formula(random):
    then, now = random.normal(0, 1, 1000), random.normal(0.7, 1.5, 400)
    found = shift(now, np.ones(400), np.arange(400), *support_of(then))
    assert found.psi == pytest.approx(psi(now, then), rel=1e-6) and found.psi > 0.3


def test_scores_with_ties_are_no_shift_of_themselves(random):
    then = random.integers(0, 4, 1000).astype(float)  # most deciles coincide
    support, rows = support_of(then)
    assert shift(then, np.ones(1000), np.arange(1000), support, rows).psi < 1e-3
    assert shift(then + 1, np.ones(1000), np.arange(1000), support, rows).psi > 0.5


def test_psi_of_a_weighted_fit_is_against_what_it_weighted_up(random):
    then = np.concatenate([random.normal(-1, 1, 500), random.normal(1, 1, 1500)])
    weight = np.repeat([3.0, 1.0], [500, 1500])  # picked by score: truly half and half
    now = np.concatenate([random.normal(-1, 1, 2000), random.normal(1, 1, 2000)])
    support, rows = support_of(then, weight)
    assert shift(now, np.ones(4000), np.arange(4000), support, rows).psi < 0.01
    assert shift(now, np.ones(4000), np.arange(4000), *support_of(then)).psi > 0.1


@pytest.mark.slow
def test_psi_passes_its_level_by_chance_once_in_a_hundred(random):
    over = 0
    for _ in range(1000):
        then, now = random.normal(size=500), random.normal(size=200)
        found = shift(now, np.ones(200), np.arange(200), *support_of(then))
        over += found.psi > found.psi_by_chance
    assert over / 1000 < 0.025


def test_out_of_support_is_what_the_calibrator_counts(random):
    calibrator = IsotonicCalibrator().fit(np.linspace(-2, 2, 100), np.arange(100) >= 50)
    now = random.normal(0, 2, 300)
    monitor = DriftMonitor(calibrator)
    monitor.remember(list(range(300)), now, step=0)
    found = monitor.report().shift.out_of_support
    assert found.value == pytest.approx(calibrator.out_of_support(now) / 300)
    expected = stats.binomtest(calibrator.out_of_support(now), 300).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx(tuple(expected), rel=1e-9)


def test_brier_parts_add_up_and_expected_minus_observed_is_the_gap(random):
    monitor = DriftMonitor(IdentityCalibrator())
    logits = random.normal(0, 2, 500)
    monitor.update(logits, random.random(500) < 0.4, step=0)
    labels = monitor.report().labels
    parts = labels.brier_parts
    assert labels.brier == pytest.approx(parts.reliability - parts.resolution + parts.uncertainty + parts.within_bin)
    assert labels.gap.value == pytest.approx(labels.expected - labels.observed)
    assert labels.expected == pytest.approx(expit(logits).mean())
