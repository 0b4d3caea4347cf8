"""Is a mean told apart from zero? The sign-flip test per cell, and Benjamini and Hochberg's correction over cells.

The test is the one-sample permutation test of paired differences (Fisher 1935): were "patched" and "corrupted" the
same thing, each record's difference would be as likely to have the other sign, so its sign is flipped at random, and
p is the share of flips whose sum is at least as far from zero as the one measured. It assumes that the records are
independent and that a difference is symmetric about zero where nothing happens. With n records p cannot be less than
2^(1-n): five records never reach 0.05, whatever their values.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from .errors import WorkFailed
from .stats import _MAX_CELLS

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
