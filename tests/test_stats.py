"""Bootstrap intervals, the sign-flip test and q: against scipy and enumeration, with missing values, at the edges."""

import itertools
import json
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from kt import stats
from kt.errors import WorkFailed
from kt.stats import (
    benjamini_hochberg,
    bootstrap_mean,
    bootstrap_mean_grid,
    bootstrap_ratio,
    paired_bootstrap_difference,
    sign_flip_test,
    smallest_p,
)

NAN = float("nan")


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


@pytest.mark.parametrize("n", [10, 37, 100])
@pytest.mark.parametrize("right", [1, 2, 3])
def test_a_bound_that_is_zero_is_zero_and_not_what_rounding_leaves(n, right):
    for values in ([1.0] * right + [0.0] * (n - right), [-0.1] * right + [0.3] * (n - right)):
        low, high = bootstrap_mean(values, n_boot=500)[1:3]
        assert all(bound == 0 or abs(bound) > 1e-6 for bound in (low, high))
    rare = bootstrap_mean([1.0] + [0.0] * (n - 1), n_boot=500)
    share = bootstrap_ratio([0.1] + [0.0] * (n - 1), [0.3] * n, n_boot=500)
    for found in (rare, share):
        assert math.copysign(1, found.low) == 1 and found.low == 0 < found.mean


def test_two_scores_that_differ_in_the_last_bit_are_a_tie():
    first, second = [0.1 + 0.2, 0.7, 1 / 3], [0.3, 0.1 * 7, 1 - 2 / 3]
    assert first != second and paired_bootstrap_difference(first, second) == (0, 0, 0, 3)


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


def enumerated(column):
    """The definition, one flip at a time, over the records that have the cell."""
    column = [v for v in column if not np.isnan(v)]
    flips = list(itertools.product((1, -1), repeat=len(column)))
    observed = abs(sum(column))
    return sum(abs(sum(s * v for s, v in zip(f, column, strict=True))) >= observed - 1e-9 for f in flips) / len(flips)


def cells(n, *shape, seed=0, shift=0.4):
    return np.random.default_rng(seed).normal(shift, 1.0, size=(n, *shape))


def test_few_records_are_tested_exactly_also_where_some_lack_the_cell():
    values = cells(8, 3, 4)
    values[:3, 0, 0] = NAN
    values[5, 1] = NAN
    values[1:, 2, 3] = NAN
    expected = [[enumerated(values[:, i, j]) for j in range(4)] for i in range(3)]
    np.testing.assert_allclose(sign_flip_test(values), expected, rtol=0, atol=1e-15)


def test_exact_p_equals_scipys_permutation_test():
    values = cells(9, seed=3)
    theirs = scipy_stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_test(values) == pytest.approx(theirs.pvalue, abs=1e-15)


def test_drawn_p_comes_near_the_exact_one_and_near_the_t_test():
    exact = sign_flip_test(cells(13, 40, seed=1), n_flips=2**13)
    drawn = sign_flip_test(cells(13, 40, seed=1), n_flips=2**13 - 1)
    assert not np.array_equal(exact, drawn)
    np.testing.assert_allclose(drawn, exact, atol=4 * np.sqrt(0.25 / 2**13))
    values = cells(200, 20, seed=2, shift=0.1)
    np.testing.assert_allclose(sign_flip_test(values), scipy_stats.ttest_1samp(values, 0).pvalue, atol=0.02)


def test_the_number_of_flips_and_the_bounds_of_p_are_as_documented():
    certain = np.ones((30, 2)) * [1.0, -2.0]
    np.testing.assert_array_equal(sign_flip_test(certain, n_flips=999), [1 / 1000, 1 / 1000])
    np.testing.assert_array_equal(sign_flip_test(np.ones((5, 1))), [2 / 32])
    np.testing.assert_array_equal(smallest_p(np.array([0, 1, 5])), [NAN, 1, 2 / 32])


def test_zeros_have_p_one_no_record_has_no_p_and_one_record_cannot_be_told_apart():
    for n in (1, 4, 40):
        assert sign_flip_test(np.zeros((n, 2))).tolist() == [1, 1]
    assert np.isnan(sign_flip_test(np.full((4, 2), NAN))).all()
    assert sign_flip_test(np.array([[3.0]])) == 1
    assert sign_flip_test(np.zeros((0, 2, 3))).shape == (2, 3)


def test_equal_values_tie_whatever_the_order_of_addition():
    values = np.tile([[0.1], [-0.1]], (10, 1)) + np.array([[0.3], [0.3]] * 10)
    mixed = np.array([0.1, 0.2, 0.3, -0.6])[:, None]
    assert sign_flip_test(mixed) == 1
    assert sign_flip_test(values * 1e-30) == sign_flip_test(values)


def test_a_lacking_record_counts_for_nothing_among_many():
    values = cells(30, 2, seed=5)
    values[10:, 1] = NAN
    p = sign_flip_test(values)
    assert p[1] == enumerated(values[:, 1])


def test_the_same_seed_gives_the_same_p_and_blocks_do_not_matter(monkeypatch):
    values = cells(40, 7, 3, shift=0.2)
    p = sign_flip_test(values, seed=1)
    np.testing.assert_array_equal(p, sign_flip_test(values, seed=1))
    assert not np.array_equal(p, sign_flip_test(values, seed=2))
    np.testing.assert_allclose(p[2], sign_flip_test(values[:, 2], seed=1), atol=2e-4)
    monkeypatch.setattr(stats, "_MAX_CELLS", 900)
    np.testing.assert_allclose(sign_flip_test(values, seed=1), p, atol=0.03)


def test_p_is_uniform_where_nothing_happens():
    p = sign_flip_test(cells(25, 4000, seed=7, shift=0.0), n_flips=2000)
    for level in (0.01, 0.05, 0.5):
        assert abs((p <= level).mean() - level) < 4 * np.sqrt(level * (1 - level) / 4000)


def test_infinite_values_and_no_flips_are_refused():
    with pytest.raises(WorkFailed, match="1 of 4 values are infinite"):
        sign_flip_test(np.array([[1.0, 2.0], [np.inf, 1.0]]))
    with pytest.raises(ValueError, match="n_flips"):
        sign_flip_test(np.ones((3, 1)), n_flips=0)


def test_q_equals_scipys_and_nan_stays_out_of_the_count():
    p = np.random.default_rng(0).uniform(size=(6, 8)) ** 2
    p[2] = p[3]
    flat = scipy_stats.false_discovery_control(p.ravel(), method="bh")
    np.testing.assert_allclose(benjamini_hochberg(p), flat.reshape(p.shape), rtol=1e-12)
    holed = p.copy()
    holed[0, 0] = holed[5] = NAN
    kept = ~np.isnan(holed)
    found = benjamini_hochberg(holed)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(holed))
    np.testing.assert_allclose(found[kept], scipy_stats.false_discovery_control(holed[kept], method="bh"), rtol=1e-12)
    assert np.isnan(benjamini_hochberg(np.full(3, NAN))).all() and benjamini_hochberg(np.zeros(0)).size == 0


def test_a_hundred_facts_in_six_roles_and_32_layers_take_a_fraction_of_a_second():
    values = cells(100, 6, 32, seed=9)
    start = time.process_time()
    sign_flip_test(values)
    assert time.process_time() - start < 2
