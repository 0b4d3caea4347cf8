"""Means with bootstrap intervals: every figure that `kt` reports carries its n and one of these.

The percentile bootstrap resamples records (facts), not prompts, tokens or noise draws: a record's own
repetitions are averaged first. It cannot see beyond the data: n = 0 has no mean, n = 1 has no interval (both
NaN here, null in JSON), and values that are all equal give an interval of width zero however few they are.
Read n beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from .errors import WorkFailed

_MAX_CELLS = 2_000_000
"""Numbers a bootstrap holds at once (16 MB); larger grids go in blocks, with the same resamples."""


class Interval(NamedTuple):
    """A mean over n records with its confidence interval; NaN where there is none (see the module)."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def ci95(self) -> tuple[float, float] | None:
        """The interval as (low, high), or None where n is too small to have one."""
        return None if math.isnan(self.low) or math.isnan(self.high) else (self.low, self.high)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: {mean, ci95, n}, null instead of NaN."""
        ci95 = None if self.ci95 is None else list(self.ci95)
        return {"mean": None if math.isnan(self.mean) else self.mean, "ci95": ci95, "n": self.n}

    @classmethod
    def of(cls, held: Mapping[str, Any] | None) -> Interval:
        """From what `as_dict` gave; NaN stands for null. None is a mean over nothing."""
        held = held or {"mean": None, "ci95": None, "n": 0}
        numbers = (held["mean"], *(held["ci95"] or (None, None)))
        mean, low, high = (math.nan if number is None else float(number) for number in numbers)
        return cls(mean, low, high, int(held["n"]))

    def __str__(self) -> str:
        if self.n == 0:
            return "n/a"
        if self.ci95 is None:
            return f"{self.mean:.3f} (n={self.n})"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.n})"


class IntervalGrid(NamedTuple):
    """Cell by cell what `Interval` is for one number."""

    mean: Float[ndarray, "*cell"]
    low: Float[ndarray, "*cell"]
    high: Float[ndarray, "*cell"]
    n: Int[ndarray, "*cell"]


def bootstrap_mean(
    values: Sequence[float] | Float[ndarray, " n"], n_boot: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """The mean of the values that are not NaN, with a percentile bootstrap interval over them."""
    column = np.asarray(values, dtype=np.float64).reshape(-1)
    grid = bootstrap_mean_grid(column[~np.isnan(column)], n_boot, seed, level)
    return Interval(float(grid.mean), float(grid.low), float(grid.high), int(grid.n))


def paired_bootstrap_difference(
    first: Sequence[float] | Float[ndarray, " n"],
    second: Sequence[float] | Float[ndarray, " n"],
    n_boot: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """mean(first - second) over the same records in the same order; pairs with a NaN are left out.

    Raises:
        ValueError: the two do not have the same length.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"a paired difference needs the same records twice; got shapes {a.shape} and {b.shape}")
    return bootstrap_mean(a - b, n_boot, seed, level)


def bootstrap_ratio(
    top: Sequence[float] | Float[ndarray, " n"],
    bottom: Sequence[float] | Float[ndarray, " n"],
    n_boot: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """mean(top) / mean(bottom) over the same records, resampled together; records with a NaN are left out.

    A ratio over a mean that is not above zero says nothing: there it is NaN, and where resampling finds such a mean
    more than once in a hundred draws, there is no interval.

    Raises:
        ValueError: the two do not have the same length.
    """
    a, b = np.asarray(top, dtype=np.float64), np.asarray(bottom, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"a ratio needs the same records twice; got shapes {a.shape} and {b.shape}")
    both = np.stack([a, b], 1)[~(np.isnan(a) | np.isnan(b))]
    return bootstrap_of_means(both, _ratio, n_boot, seed, level)


def _ratio(means: Float[ndarray, "draw 2"]) -> Float[ndarray, " draw"]:
    top, bottom = means.T
    return np.divide(top, bottom, out=np.full(len(means), np.nan), where=bottom > 0)


def bootstrap_of_means(
    table: Float[ndarray, "n column"],
    statistic: Callable[[Float[ndarray, "draw column"]], Float[ndarray, " draw"]],
    n_boot: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """A function of the columns' means with a percentile bootstrap interval; records are resampled whole.

    A column's mean is over the records that have it (NaN: lacks it), and n is the smallest of the columns' counts.
    There is no interval below n = 2, nor where more than one draw in a hundred has no value.
    """
    present = ~np.isnan(table)
    n = int(present.sum(0).min())
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    filled, shown = np.where(present, table, 0.0), present.astype(np.float64)
    mean = float(statistic((filled.sum(0) / shown.sum(0))[None])[0])
    if n < 2 or math.isnan(mean):
        return Interval(mean, math.nan, math.nan, n)
    drawn = []
    for times in _resamples(len(table), n_boot, seed):
        counts = times @ shown
        drawn.append(statistic(np.divide(times @ filled, counts, out=np.full_like(counts, np.nan), where=counts > 0)))
    found = np.concatenate(drawn)
    good = found[~np.isnan(found)]
    if len(good) < 0.99 * len(found):
        return Interval(mean, math.nan, math.nan, n)
    low, high = np.quantile(good, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), n)


def bootstrap_mean_grid(
    values: Float[ndarray, "n ..."], n_boot: int = 2000, seed: int = 0, level: float = 0.95
) -> IntervalGrid:
    """The mean over the first axis of every cell, with intervals; NaN marks a record that lacks the cell.

    The records are resampled together for all cells, so neighbouring cells stay comparable.

    Raises:
        WorkFailed: a value is infinite.
    """
    values = np.asarray(values, dtype=np.float64)
    n, shape = values.shape[0], values.shape[1:]
    if np.isinf(values).any():
        raise WorkFailed(f"{int(np.isinf(values).sum())} of {values.size} values are infinite; no mean exists")
    flat = values.reshape(n, int(np.prod(shape)))
    present = ~np.isnan(flat)
    counts, filled = present.sum(0), np.where(present, flat, 0.0)
    mean = np.divide(filled.sum(0), counts, out=np.full(flat.shape[1], np.nan), where=counts > 0)
    # Resampling deviations from the mean instead of the values keeps equal values exactly equal.
    deviation = np.where(present, flat - mean, 0.0)
    spread = np.full((2, flat.shape[1]), np.nan)
    wanted, width = np.flatnonzero(counts > 1), max(1, _MAX_CELLS // n_boot)
    for start in range(0, len(wanted), width):
        cells = wanted[start : start + width]
        spread[:, cells] = _percentiles(deviation[:, cells], present[:, cells], n_boot, seed, level)
    low, high = (mean + spread).reshape(2, *shape)
    return IntervalGrid(mean.reshape(shape), low, high, counts.reshape(shape))


def median_grid(values: Float[ndarray, "n ..."], level: float = 0.95) -> IntervalGrid:
    """The median over the first axis of every cell (as `mean`), with intervals; NaN marks a record without the cell.

    The interval runs between two order statistics: the j-th smallest and the j-th largest value with the largest j
    for which a fair coin thrown n times shows fewer than j heads with a chance of at most (1 - level) / 2. It holds
    whatever the values' distribution; below n = 6 (at 95%) there is none, which is NaN here.

    Raises:
        WorkFailed: a value is infinite.
    """
    from scipy.stats import binom

    values = np.asarray(values, dtype=np.float64)
    shape = values.shape[1:]
    if np.isinf(values).any():
        raise WorkFailed(f"{int(np.isinf(values).sum())} of {values.size} values are infinite; no interval exists")
    ordered = np.sort(values.reshape(values.shape[0], int(np.prod(shape))), axis=0)  # NaN goes last
    counts = (~np.isnan(ordered)).sum(0)
    found = np.full((3, ordered.shape[1]), np.nan)
    for n in np.unique(counts[counts > 0]):
        cells = np.flatnonzero(counts == n)
        found[0, cells] = (ordered[(n - 1) // 2, cells] + ordered[n // 2, cells]) / 2
        j = int(np.searchsorted(binom.cdf(np.arange(n), n, 0.5), (1 - level) / 2, side="right"))
        if j > 0:
            found[1:, cells] = ordered[j - 1, cells], ordered[n - j, cells]
    middle, low, high = found.reshape(3, *shape)
    return IntervalGrid(middle, low, high, counts.reshape(shape))


def _percentiles(
    deviation: Float[ndarray, "n cell"], present: ndarray, n_boot: int, seed: int, level: float
) -> Float[ndarray, "2 cell"]:
    """The quantiles of the resampled means, as deviations from the mean."""
    complete, blocks = bool(present.all()), []
    for times in _resamples(len(deviation), n_boot, seed):
        total = times.sum(1, keepdims=True) if complete else times @ present.astype(np.float64)
        sums = times @ deviation
        blocks.append(np.divide(sums, total, out=np.full_like(sums, np.nan), where=total > 0))
    tails = [(1 - level) / 2, (1 + level) / 2]
    draws = np.concatenate(blocks)
    return np.quantile(draws, tails, axis=0) if complete else np.nanquantile(draws, tails, axis=0)


def _resamples(n: int, n_boot: int, seed: int) -> Iterator[Float[ndarray, "draw n"]]:
    """How often each record is drawn, in blocks of draws: the same for the same n and seed."""
    rng, block = np.random.default_rng(seed), max(1, _MAX_CELLS // n)
    for start in range(0, n_boot, block):
        rows = min(block, n_boot - start)
        picks = rng.integers(n, size=(rows, n)) + np.arange(rows)[:, None] * n
        yield np.bincount(picks.reshape(-1), minlength=rows * n).reshape(rows, n).astype(np.float64)


# Is a mean told apart from zero? The sign-flip test per cell, and Benjamini and Hochberg's correction over cells.
#
# The test is the one-sample permutation test of paired differences (Fisher 1935): were "patched" and "corrupted" the
# same thing, each record's difference would be as likely to have the other sign, so its sign is flipped at random, and
# p is the share of flips whose sum is at least as far from zero as the one measured. It assumes that the records are
# independent and that a difference is symmetric about zero where nothing happens. With n records p cannot be less than
# 2^(1-n): five records never reach 0.05, whatever their values.

_TIE = 1e-12
"""Sums closer than this, as a part of the sum of magnitudes, are equal: the order of an addition must not decide."""


def smallest_p(n: Float[ndarray, "*cell"] | int) -> Float[ndarray, "*cell"]:
    """The least p that n records can have: 2^(1-n), 1 for a single one and NaN for none."""
    counts = np.asarray(n, dtype=np.float64)
    return np.where(counts > 0, 2.0 ** (1 - counts), np.nan)


def sign_flip_test(values: Float[ndarray, "n ..."], n_flips: int = 10_000, seed: int = 0) -> Float[ndarray, "*cell"]:
    """Two-sided p of a mean of zero for every cell, over the first axis; NaN marks a record that lacks the cell.

    A cell with at most log2(n_flips) records is tested with all its 2^n flips, and its p is exact. The others share
    `n_flips` seeded random flips (drawn for whole records, so neighbouring cells stay comparable) and have
    p = (1 + flips at least as far) / (1 + n_flips) (Phipson & Smyth 2010), which is never 0. A cell that is 0 in every
    record has p = 1, a cell without a record NaN.

    Raises:
        ValueError: `n_flips` is below 1.
        WorkFailed: a value is infinite.
    """
    values = np.asarray(values, dtype=np.float64)
    if n_flips < 1:
        raise ValueError(f"n_flips = {n_flips}: a test needs one flip or more")
    if np.isinf(values).any():
        raise WorkFailed(f"{int(np.isinf(values).sum())} of {values.size} values are infinite; no mean can be tested")
    n, shape = values.shape[0], values.shape[1:]
    flat = values.reshape(n, int(np.prod(shape)))
    present = ~np.isnan(flat)
    counts, filled = present.sum(0), np.where(present, flat, 0.0)
    p = np.where(counts > 0, 1.0, np.nan)
    # A cell of zeros is its own every flip; leaving it out saves the time of tokens that hold nothing.
    live = (filled != 0).any(0)
    few = counts <= int(np.log2(n_flips))
    if (exact := np.flatnonzero(live & few)).size:
        p[exact] = _exact(_packed(filled[:, exact], present[:, exact]))
    if (drawn := np.flatnonzero(live & ~few)).size:
        p[drawn] = _drawn(filled[:, drawn], n_flips, seed)
    return p.reshape(shape)


def benjamini_hochberg(p: Float[ndarray, "*cell"]) -> Float[ndarray, "*cell"]:
    """q of every cell: the least false discovery rate at which it counts as found, among all cells that have a p.

    Benjamini & Hochberg (1995), step up: q of the k-th smallest of m is the least p_j m / j over j >= k. NaN stays NaN
    and is not counted in m.
    """
    p = np.asarray(p, dtype=np.float64)
    q = np.full(p.shape, np.nan)
    tested = p[~np.isnan(p)]
    if tested.size:
        order = np.argsort(tested, kind="stable")
        steps = tested[order] * tested.size / np.arange(1, tested.size + 1)
        best = np.minimum.accumulate(steps[::-1])[::-1]
        corrected = np.empty_like(tested)
        corrected[order] = np.minimum(best, 1.0)
        q[~np.isnan(p)] = corrected
    return q


def _packed(filled: Float[ndarray, "n cell"], present: Bool[ndarray, "n cell"]) -> Float[ndarray, "record cell"]:
    """Each cell's own records first, the lacking ones (zeros) cut off as far as all cells allow."""
    order = np.argsort(~present, axis=0, kind="stable")
    return np.take_along_axis(filled, order, axis=0)[: int(present.sum(0).max())]


def _exact(values: Float[ndarray, "record cell"]) -> Float[ndarray, " cell"]:
    """The share over all sign patterns. A pattern and its opposite are equally far: the first sign stays."""
    records = len(values)
    codes = np.arange(2 ** (records - 1))[:, None]
    signs = np.ones((len(codes), records))
    signs[:, 1:] -= 2.0 * ((codes >> np.arange(records - 1)) & 1)
    # Lacking records are zeros here: every pattern of the others occurs equally often, so the share is the same.
    return _as_far(signs, values) / len(codes)


def _drawn(values: Float[ndarray, "n cell"], n_flips: int, seed: int) -> Float[ndarray, " cell"]:
    found = sum(_as_far(signs, values) for signs in _flips(len(values), n_flips, seed))
    return np.asarray((1 + found) / (1 + n_flips))


def _flips(n: int, n_flips: int, seed: int) -> Iterator[Float[ndarray, "flip n"]]:
    """Random signs in blocks: the same for the same n and seed, whatever the cells."""
    rng, block = np.random.default_rng(seed), max(1, _MAX_CELLS // n)
    for start in range(0, n_flips, block):
        yield 2.0 * rng.integers(2, size=(min(block, n_flips - start), n), dtype=np.int8) - 1


def _as_far(signs: Float[ndarray, "flip n"], values: Float[ndarray, "n cell"]) -> Float[ndarray, " cell"]:
    """How many of the flipped sums are at least as far from zero as the sum itself."""
    bar = np.abs(values.sum(0)) - _TIE * np.abs(values).sum(0)
    found, width = np.zeros(values.shape[1]), max(1, _MAX_CELLS // len(signs))
    for start in range(0, values.shape[1], width):
        cells = slice(start, start + width)
        sums = signs @ values[:, cells]
        found[cells] = (np.abs(sums, out=sums) >= bar[cells]).sum(0)
    return found
