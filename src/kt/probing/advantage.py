"""How far an answer stands out in the logit lens from other answers of its relation, and how much of that an edit left.

visibility   v = 1 - ln(1 + rank) / ln(V): 1 at the top of the vocabulary, 0 at its bottom
advantage    a = v(old answer) - mean over controls v(control); controls are other answers of the same relation, so an
             answer that is visible only because every answer of its relation is has none
score        sum over cells of mean_facts a after the edit / the same sum before it, over the cells (position, layer)
             where the unedited model gives the old answer an advantage

The cells are chosen on the unedited model alone, so that no edit can choose its own yardstick. They are those whose
mean has a 95% interval above 0, each tested by itself: one that is there by chance weighs little, as its advantage is
small.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from ..stats import Interval, bootstrap_mean, bootstrap_mean_grid, bootstrap_ratio

OLD, NEW, CONTROLS = 0, 1, slice(2, None)
"""The places of the answers on the axis `token`."""

TOP = 10
"""Candidates that the head projection attack takes from each layer."""


class Remainder(NamedTuple):
    """What an edit left of the old answer's advantage in some cells.

    `score` is after / before; `before` and `after` are the mean advantage over those cells (units of visibility), and
    `cells` are the (position, layer) that count. Without cells there is nothing to lose: all are NaN.
    """

    score: Interval
    before: Interval
    after: Interval
    cells: tuple[tuple[str, int], ...]


def visibility(rank: Int[ndarray, "*cell"], vocab: int) -> Float[ndarray, "*cell"]:
    """1 - ln(1 + rank) / ln(V); NaN where the rank is -1 (no such token)."""
    seen = 1 - np.log1p(np.maximum(rank, 0, dtype=np.float64)) / math.log(vocab)
    return np.where(rank < 0, np.nan, seen)


def mean_visibility(rank: Int[ndarray, "*cell token"], vocab: int) -> Float[ndarray, "*cell"]:
    """The mean over the tokens that there are; NaN where there is none."""
    seen = visibility(rank, vocab)
    there = ~np.isnan(seen)
    n = there.sum(-1)
    return np.divide(np.where(there, seen, 0.0).sum(-1), n, out=np.full(n.shape, np.nan), where=n > 0)


def advantage(rank: Int[ndarray, "fact *cell token"], vocab: int) -> Float[ndarray, fact * cell]:
    """a for every fact and cell; NaN for a fact without controls."""
    return visibility(rank[..., OLD], vocab) - mean_visibility(rank[..., CONTROLS], vocab)


def in_top(rank: Int[ndarray, "fact position kind layer token"]) -> Float[ndarray, "fact position kind answer"]:
    """Whether the old and the new answer are among the best `TOP` tokens in any layer, and the share of controls."""
    there: ndarray = np.any(rank >= 0, axis=3)
    reached: ndarray = np.any((rank >= 0) & (rank < TOP), axis=3)
    n = there[..., CONTROLS].sum(-1)
    share = np.divide(reached[..., CONTROLS].sum(-1), n, out=np.full(n.shape, np.nan), where=n > 0)
    return np.stack([reached[..., OLD], reached[..., NEW], share], -1, dtype=np.float64)


def leading(before: Float[ndarray, fact * cell], n_boot: int = 2000, seed: int = 0) -> Bool[ndarray, "*cell"]:
    """The cells where the unedited model's mean advantage has a 95% interval above 0.

    A single fact has no interval: its cells are those with an advantage above 0, and its score is to be read so.
    """
    grid = bootstrap_mean_grid(before, n_boot, seed)
    bound = np.where(grid.n > 1, grid.low, grid.mean)
    return np.nan_to_num(bound, nan=0.0) > 0


def remainder(
    before: Float[ndarray, fact * cell],
    after: Float[ndarray, fact * cell],
    chosen: Bool[ndarray, "*cell"],
    names: tuple[tuple[str, int], ...],
    n_boot: int = 2000,
    seed: int = 0,
) -> Remainder:
    """Score and mean advantages over the chosen cells; `names` are the chosen cells' (position, layer)."""
    if not chosen.any():
        n = int((~np.isnan(before).any(tuple(range(1, before.ndim)))).sum())
        none = Interval(math.nan, math.nan, math.nan, n)
        return Remainder(none, none, none, ())
    was, now = before[:, chosen].mean(-1), after[:, chosen].mean(-1)
    return Remainder(
        bootstrap_ratio(now, was, n_boot, seed),
        bootstrap_mean(was, n_boot, seed),
        bootstrap_mean(now, n_boot, seed),
        names,
    )
