"""Statistics over records: means and medians with intervals, sign-flip tests, false discovery rates.

Every figure that `kt` reports carries its n and one of these intervals. A record is a fact, not a prompt, token or
noise draw: a record's own repetitions are averaged first. NaN marks a missing value.

Bootstrap intervals are percentile intervals over resampled records. They cannot see beyond the data: n = 0 has no
mean, n = 1 has no interval (both NaN here, null in JSON), and equal values give an interval of width zero however
small n is. Read n beside the interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from .errors import KtError, WorkFailed

_MAX_CELLS = 2_000_000
"""Numbers that a bootstrap or a test holds at once (16 MB); larger grids go in blocks, with the same resamples."""

_TIE = 1e-12
"""Sums closer than this share of their magnitudes' sum are equal: the order of an addition must not decide."""


class Interval(NamedTuple):
    """A mean over n records with its confidence interval, in the values' unit; NaN where there is none."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def ci95(self) -> tuple[float, float] | None:
        """(low, high), or None if n is too small for an interval."""
        return None if math.isnan(self.low) or math.isnan(self.high) else (self.low, self.high)

    def as_dict(self) -> dict[str, Any]:
        """{mean, ci95, n} for JSON, with null for NaN."""
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
    """An `Interval` for every cell, as arrays."""

    mean: Float[ndarray, "*cell"]
    low: Float[ndarray, "*cell"]
    high: Float[ndarray, "*cell"]
    n: Int[ndarray, "*cell"]

    def cell(self, *at: int) -> Interval:
        """The cell at an index by axis."""
        return Interval(float(self.mean[at]), float(self.low[at]), float(self.high[at]), int(self.n[at]))


def bootstrap_mean(
    values: Sequence[float] | Float[ndarray, " n"], n_boot: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """The mean of the values that are not NaN, with a percentile bootstrap interval (Efron 1979).

    Args:
        values: one per record.
        n_boot: number of resamples.
        seed: of the resampling; the same seed and n give the same resamples.
        level: the interval's coverage.

    Returns:
        Mean, bounds and the number of values that are not NaN.

    Raises:
        WorkFailed: a value is infinite.
    """
    column = np.asarray(values, dtype=np.float64).reshape(-1)
    return bootstrap_mean_grid(column[~np.isnan(column)], n_boot, seed, level).cell()


def paired_bootstrap_difference(
    first: Sequence[float] | Float[ndarray, " n"],
    second: Sequence[float] | Float[ndarray, " n"],
    n_boot: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """mean(first - second), with an interval over records.

    Args:
        first, second: values of the same records in the same order; pairs with a NaN are left out.
        n_boot, seed, level: as in `bootstrap_mean`.

    Returns:
        Mean difference, bounds and the number of complete pairs.

    Raises:
        ValueError: the two do not have the same shape.
        WorkFailed: a difference is infinite.
    """
    a, b = _paired(first, second, "paired difference")
    same = np.abs(a - b) <= _TIE * np.maximum(np.abs(a), np.abs(b))
    return bootstrap_mean(np.where(same, 0.0, a - b), n_boot, seed, level)


def bootstrap_ratio(
    top: Sequence[float] | Float[ndarray, " n"],
    bottom: Sequence[float] | Float[ndarray, " n"],
    n_boot: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """mean(top) / mean(bottom), with an interval over records.

    A ratio over a mean that is not above zero is NaN. There is no interval if more than one resample in a hundred has
    such a mean.

    Args:
        top, bottom: values of the same records in the same order, resampled together; records with a NaN are left out.
        n_boot, seed, level: as in `bootstrap_mean`.

    Returns:
        Ratio, bounds and the number of complete pairs.

    Raises:
        ValueError: the two do not have the same shape.
    """
    pairs = np.stack(_paired(top, bottom, "ratio"), 1)
    return bootstrap_of_means(pairs[~np.isnan(pairs).any(1)], _ratio, n_boot, seed, level)


def _paired(first: Any, second: Any, statistic: str) -> tuple[Float[ndarray, " n"], Float[ndarray, " n"]]:
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"a {statistic} needs the same records twice; got shapes {a.shape} and {b.shape}")
    return a, b


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
    """A function of several columns' means, with an interval over records.

    Args:
        table: one row per record, resampled whole; a column's mean is over the records that are not NaN in it.
        statistic: from rows of column means to one number each; NaN where it has no value.
        n_boot, seed, level: as in `bootstrap_mean`.

    Returns:
        The statistic, bounds and the smallest of the columns' counts. There is no interval below n = 2, nor if more
        than one resample in a hundred has no value.
    """
    present = ~np.isnan(table)
    n = int(present.sum(0).min())
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    filled, weights = np.where(present, table, 0.0), present.astype(np.float64)
    mean = float(statistic((filled.sum(0) / weights.sum(0))[None])[0])
    if n < 2 or math.isnan(mean):
        return Interval(mean, math.nan, math.nan, n)
    blocks = []
    for times in _resamples(len(table), n_boot, seed):
        counts = times @ weights
        blocks.append(statistic(np.divide(times @ filled, counts, out=np.full_like(counts, np.nan), where=counts > 0)))
    draws = np.concatenate(blocks)
    valid = draws[~np.isnan(draws)]
    if len(valid) < 0.99 * len(draws):
        return Interval(mean, math.nan, math.nan, n)
    low, high = np.quantile(valid, [(1 - level) / 2, (1 + level) / 2])
    mean, low, high = _without_noise(np.array([mean, low, high]), np.abs(valid).max()).tolist()
    return Interval(mean, low, high, n)


def bootstrap_mean_grid(
    values: Float[ndarray, "n ..."], n_boot: int = 2000, seed: int = 0, level: float = 0.95
) -> IntervalGrid:
    """The mean of every cell over records, with intervals.

    Args:
        values: (n, *cell); NaN marks a record that lacks the cell. All cells share the resamples of records, so that
            neighbouring cells stay comparable.
        n_boot, seed, level: as in `bootstrap_mean`.

    Returns:
        Arrays of shape (*cell,).

    Raises:
        WorkFailed: a value is infinite.
    """
    flat, shape = _by_cell(values, "no mean exists")
    present = ~np.isnan(flat)
    counts, filled = present.sum(0), np.where(present, flat, 0.0)
    mean = np.divide(filled.sum(0), counts, out=np.full(flat.shape[1], np.nan), where=counts > 0)
    # Resampling deviations from the mean instead of the values keeps equal values exactly equal.
    deviation = np.where(present, flat - mean, 0.0)
    spread = np.full((2, flat.shape[1]), np.nan)
    wanted, width = np.flatnonzero(counts > 1), max(1, _MAX_CELLS // max(1, n_boot))
    for start in range(0, len(wanted), width):
        cells = wanted[start : start + width]
        spread[:, cells] = _percentiles(deviation[:, cells], present[:, cells], n_boot, seed, level)
    size = np.abs(filled).max(0, initial=0.0)
    mean, low, high = (_without_noise(part, size) for part in (mean, *(mean + spread)))
    return IntervalGrid(*(part.reshape(shape) for part in (mean, low, high, counts)))


def _without_noise(bounds: ndarray, size: ndarray) -> ndarray:
    """Zero where a number is zero but for the rounding of sums of this size: on the other side of zero a bound would
    tell a tie apart."""
    return np.where(np.abs(bounds) <= _TIE * size, 0.0, bounds)


def median_grid(values: Float[ndarray, "n ..."], level: float = 0.95) -> IntervalGrid:
    """The median of every cell over records, with distribution-free intervals.

    The bounds are the j-th smallest and the j-th largest value, with the largest j for which a binomial(n, 1/2)
    variable is below j with a probability of at most (1 - level) / 2. Below n = 6 (at 95%) there is no interval.

    Args:
        values: (n, *cell); NaN marks a record that lacks the cell.
        level: the least coverage of the interval.

    Returns:
        Arrays of shape (*cell,), the median as `mean`.

    Raises:
        WorkFailed: a value is infinite.
    """
    from scipy.stats import binom

    flat, shape = _by_cell(values, "no interval exists")
    ordered = np.sort(flat, axis=0)  # NaN goes last
    counts = (~np.isnan(ordered)).sum(0)
    rows = np.full((3, ordered.shape[1]), np.nan)
    for n in np.unique(counts[counts > 0]):
        cells = np.flatnonzero(counts == n)
        rows[0, cells] = (ordered[(n - 1) // 2, cells] + ordered[n // 2, cells]) / 2
        j = int(np.searchsorted(binom.cdf(np.arange(n), n, 0.5), (1 - level) / 2, side="right"))
        if j > 0:
            rows[1:, cells] = ordered[j - 1, cells], ordered[n - j, cells]
    median, low, high = rows.reshape(3, *shape)
    return IntervalGrid(median, low, high, counts.reshape(shape))


def _by_cell(values: Float[ndarray, "n ..."], consequence: str) -> tuple[Float[ndarray, "n cell"], tuple[int, ...]]:
    """The values in float64 with all cells on one axis, and the cells' shape."""
    values = np.asarray(values, dtype=np.float64)
    if np.isinf(values).any():
        raise WorkFailed(f"{int(np.isinf(values).sum())} of {values.size} values are infinite; {consequence}")
    n, *shape = values.shape
    return values.reshape(n, math.prod(shape)), tuple(shape)


def _percentiles(
    deviation: Float[ndarray, "n cell"], present: Bool[ndarray, "n cell"], n_boot: int, seed: int, level: float
) -> Float[ndarray, "2 cell"]:
    """Quantiles of the resampled means, as deviations from the mean."""
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
    if n_boot < 1 or seed < 0:
        raise KtError(f"n_boot is {n_boot} and seed {seed}; give at least one draw, and a seed of at least 0")
    rng, block = np.random.default_rng(seed), max(1, _MAX_CELLS // n)
    for start in range(0, n_boot, block):
        rows = min(block, n_boot - start)
        picks = rng.integers(n, size=(rows, n)) + np.arange(rows)[:, None] * n
        yield np.bincount(picks.reshape(-1), minlength=rows * n).reshape(rows, n).astype(np.float64)


def smallest_p(n: Float[ndarray, "*cell"] | int) -> Float[ndarray, "*cell"]:
    """The smallest p that `sign_flip_test` can give for n records: 2^(1-n), NaN for n = 0. Five never reach 0.05."""
    counts = np.asarray(n, dtype=np.float64)
    return np.where(counts > 0, 2.0 ** (1 - counts), np.nan)


def sign_flip_test(values: Float[ndarray, "n ..."], n_flips: int = 10_000, seed: int = 0) -> Float[ndarray, "*cell"]:
    """Two-sided one-sample permutation test of a mean of zero, for every cell (Fisher 1935).

    If the patched and the corrupted run were alike, each record's difference would have either sign with the same
    probability. So signs are flipped at random, and p is the share of flips whose sum is at least as far from zero as
    the measured one. The test assumes independent records, and differences that are symmetric about zero where there
    is no effect.

    A cell with at most log2(n_flips) records is tested with all its 2^n flips, and its p is exact. The other cells
    share `n_flips` random flips of whole records (so neighbouring cells stay comparable), with
    p = (1 + flips at least as far) / (1 + n_flips), which is never 0 (Phipson & Smyth 2010).

    Args:
        values: (n, *cell) differences; NaN marks a record that lacks the cell.
        n_flips: number of random flips.
        seed: of the random flips.

    Returns:
        p of shape (*cell,); 1 for a cell that is 0 in every record, NaN for a cell without a record.

    Raises:
        ValueError: `n_flips` is below 1.
        WorkFailed: a value is infinite.
    """
    if n_flips < 1:
        raise ValueError(f"n_flips = {n_flips}: a test needs one flip or more")
    flat, shape = _by_cell(values, "no mean can be tested")
    present = ~np.isnan(flat)
    counts, filled = present.sum(0), np.where(present, flat, 0.0)
    p = np.where(counts > 0, 1.0, np.nan)
    nonzero = (filled != 0).any(0)  # zeros have p = 1; skipping them saves the time of tokens without an effect
    few = counts <= int(np.log2(n_flips))
    if (exact := np.flatnonzero(nonzero & few)).size:
        p[exact] = _exact_p(filled[:, exact], present[:, exact])
    if (sampled := np.flatnonzero(nonzero & ~few)).size:
        p[sampled] = _sampled_p(filled[:, sampled], n_flips, seed)
    return p.reshape(shape)


def benjamini_hochberg(p: Float[ndarray, "*cell"]) -> Float[ndarray, "*cell"]:
    """q of every cell: the smallest false discovery rate at which the cell is a discovery (Benjamini & Hochberg 1995).

    q of the k-th smallest of m is the minimum of p_j m / j over j >= k, and at most 1.

    Args:
        p: NaN marks a cell that was not tested; it does not count in m.

    Returns:
        q in the shape of p, NaN where p is.
    """
    flat = np.asarray(p, dtype=np.float64).reshape(-1)
    q = np.full(flat.shape, np.nan)
    order = np.argsort(flat, kind="stable")[: np.count_nonzero(~np.isnan(flat))]  # NaN goes last
    steps = flat[order] * order.size / np.arange(1, order.size + 1)
    q[order] = np.minimum(np.minimum.accumulate(steps[::-1])[::-1], 1.0)
    return q.reshape(np.shape(p))


def _exact_p(filled: Float[ndarray, "n cell"], present: Bool[ndarray, "n cell"]) -> Float[ndarray, " cell"]:
    """p over all sign patterns. A pattern and its opposite are equally far, so the first sign stays."""
    # Each cell's own records first. Missing ones are zeros, and every pattern of the others occurs equally often.
    order = np.argsort(~present, axis=0, kind="stable")
    values = np.take_along_axis(filled, order, axis=0)[: int(present.sum(0).max())]
    codes = np.arange(2 ** (len(values) - 1))[:, None]
    signs = np.ones((len(codes), len(values)))
    signs[:, 1:] -= 2.0 * ((codes >> np.arange(len(values) - 1)) & 1)
    return _count_as_far(signs, values) / len(codes)


def _sampled_p(values: Float[ndarray, "n cell"], n_flips: int, seed: int) -> Float[ndarray, " cell"]:
    """p over random signs in blocks: the same for the same n and seed, whatever the cells."""
    n, rng = len(values), np.random.default_rng(seed)
    count, block = np.zeros(values.shape[1]), max(1, _MAX_CELLS // n)
    for start in range(0, n_flips, block):
        signs = 2.0 * rng.integers(2, size=(min(block, n_flips - start), n), dtype=np.int8) - 1
        count += _count_as_far(signs, values)
    return (1 + count) / (1 + n_flips)


def _count_as_far(signs: Float[ndarray, "flip n"], values: Float[ndarray, "n cell"]) -> Float[ndarray, " cell"]:
    """The number of flips whose sum is at least as far from zero as the sum of the values."""
    distance = np.abs(values.sum(0)) - _TIE * np.abs(values).sum(0)
    count, width = np.zeros(values.shape[1]), max(1, _MAX_CELLS // len(signs))
    for start in range(0, values.shape[1], width):
        cells = slice(start, start + width)
        sums = signs @ values[:, cells]
        count[cells] = (np.abs(sums, out=sums) >= distance[cells]).sum(0)
    return count
