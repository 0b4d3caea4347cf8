"""The sign-flip test equals enumeration and scipy; q equals scipy's false discovery control."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from scipy import stats

from kt import stats as significance
from kt.errors import WorkFailed
from kt.stats import benjamini_hochberg, sign_flip_test, smallest_p

NAN = float("nan")


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
    theirs = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_test(values) == pytest.approx(theirs.pvalue, abs=1e-15)


def test_drawn_p_comes_near_the_exact_one_and_near_the_t_test():
    exact = sign_flip_test(cells(13, 40, seed=1), n_flips=2**13)
    drawn = sign_flip_test(cells(13, 40, seed=1), n_flips=2**13 - 1)
    assert not np.array_equal(exact, drawn)
    np.testing.assert_allclose(drawn, exact, atol=4 * np.sqrt(0.25 / 2**13))
    values = cells(200, 20, seed=2, shift=0.1)
    np.testing.assert_allclose(sign_flip_test(values), stats.ttest_1samp(values, 0).pvalue, atol=0.02)


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
    monkeypatch.setattr(significance, "_MAX_CELLS", 900)
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
    flat = stats.false_discovery_control(p.ravel(), method="bh")
    np.testing.assert_allclose(benjamini_hochberg(p), flat.reshape(p.shape), rtol=1e-12)
    holed = p.copy()
    holed[0, 0] = holed[5] = NAN
    kept = ~np.isnan(holed)
    found = benjamini_hochberg(holed)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(holed))
    np.testing.assert_allclose(found[kept], stats.false_discovery_control(holed[kept], method="bh"), rtol=1e-12)
    assert np.isnan(benjamini_hochberg(np.full(3, NAN))).all() and benjamini_hochberg(np.zeros(0)).size == 0


def test_a_hundred_facts_in_six_roles_and_32_layers_take_a_fraction_of_a_second():
    values = cells(100, 6, 32, seed=9)
    start = time.process_time()
    sign_flip_test(values)
    assert time.process_time() - start < 2
