"""Bootstrap intervals: against scipy, with missing values, at the edges."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from kt import stats
from kt.errors import WorkFailed
from kt.stats import bootstrap_mean, bootstrap_mean_grid, bootstrap_ratio, paired_bootstrap_difference


def test_interval_agrees_with_scipys_percentile_bootstrap():
    values = np.random.default_rng(1).normal(2, 3, 80)
    ours = bootstrap_mean(values, n_boot=20_000)
    theirs = scipy_stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours.mean == pytest.approx(values.mean())
    assert ours.ci95 == pytest.approx(tuple(theirs), abs=0.03)


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = [
        low <= 0 <= high for low, high in (bootstrap_mean(rng.normal(size=40), n_boot=400).ci95 for _ in range(300))
    ]
    assert 0.89 < np.mean(hits) < 0.99


def test_same_seed_same_interval_and_another_seed_another():
    values = np.arange(30.0)
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3).ci95 != bootstrap_mean(values, seed=4).ci95


def test_no_values_and_one_value_have_no_interval_and_json_says_null():
    none, one = bootstrap_mean([]), bootstrap_mean([0.5])
    assert math.isnan(none.mean) and none.ci95 is None and none.n == 0
    assert one.mean == 0.5 and one.ci95 is None and one.n == 1
    assert json.dumps([none.as_dict(), one.as_dict()]) == (
        '[{"mean": null, "ci95": null, "n": 0}, {"mean": 0.5, "ci95": null, "n": 1}]'
    )
    assert (str(none), str(one)) == ("n/a", "0.500 (n=1)")


def test_equal_values_stay_exactly_equal():
    assert bootstrap_mean([0.1] * 7)[1:] == (pytest.approx(0.1), pytest.approx(0.1), 7)
    assert bootstrap_mean([1.0] * 5) == (1.0, 1.0, 1.0, 5)


def test_missing_cells_count_by_cell():
    grid = bootstrap_mean_grid(np.array([[1.0, np.nan, np.nan], [3.0, 2.0, np.nan], [5.0, np.nan, np.nan]]))
    assert grid.n.tolist() == [3, 1, 0]
    assert grid.mean[:2].tolist() == [3.0, 2.0] and np.isnan(grid.mean[2])
    assert np.isnan(grid.low).tolist() == [False, True, True]


def test_a_missing_record_changes_the_interval_little():
    values = np.random.default_rng(0).normal(size=(200, 1))
    whole = bootstrap_mean_grid(values[:150])
    holes = bootstrap_mean_grid(np.concatenate([values[:150], np.full((50, 1), np.nan)]))
    assert holes.n[0] == 150 and holes.mean[0] == pytest.approx(whole.mean[0])
    assert holes.high[0] - holes.low[0] == pytest.approx(whole.high[0] - whole.low[0], rel=0.1)


@pytest.mark.parametrize("missing", [False, True])
def test_blocks_change_nothing(monkeypatch, missing):
    values = np.random.default_rng(0).normal(size=(12, 3, 4))
    if missing:
        values[2:9, 1] = np.nan
    whole = bootstrap_mean_grid(values, n_boot=101)
    monkeypatch.setattr(stats, "_MAX_CELLS", 150)
    for a, b in zip(whole, bootstrap_mean_grid(values, n_boot=101), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20))
def test_the_mean_lies_in_its_interval(values):
    mean, low, high, n = bootstrap_mean(values, n_boot=200)
    slack = 1e-9 * max(1.0, *map(abs, values))
    assert n == len(values) and min(values) - slack <= low <= high <= max(values) + slack
    assert low - slack <= mean <= high + slack or len(values) < 8


def test_paired_difference_is_tighter_than_its_parts():
    rng = np.random.default_rng(0)
    base = rng.normal(size=100)
    better = base + 0.1 + 0.01 * rng.normal(size=100)
    difference = paired_bootstrap_difference(better, base)
    assert difference.low > 0.09 and difference.high < 0.11 and difference.n == 100


def test_a_pair_with_a_missing_half_is_left_out():
    assert paired_bootstrap_difference([1.0, np.nan, 3.0], [0.0, 1.0, np.nan]).n == 1
    with pytest.raises(ValueError, match="same records"):
        paired_bootstrap_difference([1.0], [1.0, 2.0])


def test_an_infinite_value_is_refused():
    with pytest.raises(WorkFailed, match="1 of 2 values are infinite"):
        bootstrap_mean([1.0, math.inf])


def test_the_ratio_of_means_agrees_with_scipys_paired_bootstrap():
    rng = np.random.default_rng(1)
    bottom = rng.normal(3, 1, 60)
    top = 2 * bottom + rng.normal(0, 1, 60)
    ours = bootstrap_ratio(top, bottom, n_boot=20_000)
    theirs = scipy_stats.bootstrap(
        (top, bottom),
        lambda a, b, axis=-1: a.mean(axis) / b.mean(axis),
        paired=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert ours.mean == pytest.approx(top.mean() / bottom.mean()) and ours.n == 60
    assert ours.ci95 == pytest.approx(tuple(theirs), abs=0.01)


def test_a_ratio_over_nothing_has_no_value_and_over_little_no_interval():
    assert math.isnan(bootstrap_ratio([1.0, 2.0], [1.0, -1.0]).mean) and bootstrap_ratio([], []).n == 0
    rough = bootstrap_ratio([1.0, 1.0, 1.0], [9.0, -1.0, -1.0])
    assert rough.mean == pytest.approx(3 / 7) and rough.ci95 is None
    assert bootstrap_ratio([1.0, math.nan, 3.0], [1.0, 5.0, math.nan]).n == 1
    with pytest.raises(ValueError, match="same records"):
        bootstrap_ratio([1.0], [1.0, 2.0])


def test_medians_and_their_order_statistics():
    values = np.array([5.0, 1.0, 9.0, 3.0, 7.0, 2.0, 8.0, 4.0, 6.0, 10.0])
    grid = stats.median_grid(values[:, None])
    # n = 10: P(fewer than 2 heads) = 11/1024 = 1.1%, fewer than 3 = 5.5%: from the second to the second last.
    assert (grid.mean[0], grid.low[0], grid.high[0], grid.n[0]) == (5.5, 2.0, 9.0, 10)


def test_medians_leave_out_what_is_missing_and_have_no_interval_below_six():
    column = np.array([np.nan, 4.0, 1.0, 3.0, 2.0, 5.0])
    full = np.arange(6.0)
    grid = stats.median_grid(np.stack([column, full, np.full(6, np.nan)], 1))
    assert grid.mean[:2].tolist() == [3.0, 2.5] and np.isnan(grid.mean[2])
    assert np.isnan(grid.low[0]) and np.isnan(grid.low[2])
    assert (grid.low[1], grid.high[1]) == (0.0, 5.0) and grid.n.tolist() == [5, 6, 0]


def test_a_median_s_interval_holds_it_as_often_as_it_says():
    draws = np.random.default_rng(0).exponential(size=(40, 4000))
    grid = stats.median_grid(draws)
    held = np.mean((grid.low <= np.log(2)) & (np.log(2) <= grid.high))
    assert 0.95 <= held <= 0.975
    np.testing.assert_allclose(grid.mean, np.median(draws, axis=0))


def test_medians_refuse_infinities():
    with pytest.raises(WorkFailed, match="infinite"):
        stats.median_grid(np.array([1.0, np.inf]))
