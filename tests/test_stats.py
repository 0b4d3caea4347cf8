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
from kt.stats import bootstrap_mean, bootstrap_mean_grid, paired_bootstrap_difference


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
