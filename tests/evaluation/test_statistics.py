"""Intervals and paired tests with known answers."""

import math

import numpy as np
import pytest
from scipy import stats

from spark3d.evaluation.statistics import bootstrap_interval, mean_and_sd, paired_difference


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_mean_and_sd_leave_nan_out():
    assert mean_and_sd([1.0, math.nan, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    assert all(math.isnan(x) for x in mean_and_sd([math.nan]))
    assert mean_and_sd([4.0])[0] == 4.0
    assert math.isnan(mean_and_sd([4.0])[1])


def test_the_bootstrap_agrees_with_scipy():
    values = rng().normal(0.7, 0.1, 24)
    ours = bootstrap_interval(values, rng())
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000)
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.003)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.003)
    assert ours.low < values.mean() < ours.high
    assert math.isnan(bootstrap_interval([0.5, math.nan], rng()).low)


def test_the_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    hits = 0
    for seed in range(200):
        interval = bootstrap_interval(np.random.default_rng(seed).normal(0, 1, 40), rng(), 0.9, 400)
        hits += interval.low <= 0 <= interval.high
    assert 165 <= hits <= 195


def test_paired_difference_of_known_numbers():
    first = {"a": 0.5, "b": 0.6, "c": 0.7, "d": 0.8, "only first": 0.1, "gone": math.nan}
    second = {"a": 0.6, "b": 0.8, "c": 0.6, "d": 1.2, "gone": 0.3}
    result = paired_difference(first, second, rng())
    assert (result.pairs, result.positive, result.negative) == (4, 3, 1)
    assert result.mean == pytest.approx(0.15)
    test = stats.ttest_1samp([0.1, 0.2, -0.1, 0.4], 0)
    interval = test.confidence_interval()
    assert result.interval.low == pytest.approx(interval.low)
    assert result.interval.high == pytest.approx(interval.high)
    # sums of 0.1 0.2 0.1 0.4 with 16 sign patterns: 6 of them reach |0.6| or more
    assert result.permutation_p == pytest.approx(6 / 16)
    assert result.wilcoxon_p == pytest.approx(stats.wilcoxon([0.1, 0.2, -0.1, 0.4]).pvalue)


@pytest.mark.parametrize("pairs", [8, 30])
def test_the_sign_flip_test_agrees_with_scipy(pairs):
    difference = rng().normal(0.3, 1, pairs)
    keys = [str(i) for i in range(pairs)]
    ours = paired_difference(
        dict.fromkeys(keys, 0.0), dict(zip(keys, difference, strict=True)), rng()
    )
    theirs = stats.permutation_test((difference,), np.mean, permutation_type="samples", rng=rng())
    assert ours.permutation_p == pytest.approx(theirs.pvalue, abs=0.015)


def test_a_run_against_itself_shows_no_difference():
    run = {str(i): 0.1 * i for i in range(6)}
    result = paired_difference(run, run, rng())
    assert (result.mean, result.sd, result.positive, result.negative) == (0, 0, 0, 0)
    assert (result.wilcoxon_p, result.permutation_p) == (1.0, 1.0)


def test_runs_without_a_common_case_have_no_difference():
    result = paired_difference({"a": 1.0}, {"b": 1.0}, rng())
    assert result.pairs == 0
    assert math.isnan(result.mean)
    assert math.isnan(result.permutation_p)
