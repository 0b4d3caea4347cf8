"""Means with bootstrap intervals: every figure that `kt` reports carries its n and one of these.

The percentile bootstrap resamples records (facts), not prompts, tokens or noise draws: a record's own
repetitions are averaged first. It cannot see beyond the data: n = 0 has no mean, n = 1 has no interval (both
NaN here, null in JSON), and values that are all equal give an interval of width zero however few they are.
Read n beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
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
