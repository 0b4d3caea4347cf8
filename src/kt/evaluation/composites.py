"""Figures that are functions of several means: the harmonic Score, with records resampled together.

The Score of ROME, MEMIT and JEEP is 3 / (1/ES + 1/GS + 1/LS) of the three means, not a mean of anything a record has:
its interval draws records with all their values, takes the means and then the function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from ..stats import Interval

Statistic = Callable[[Float[ndarray, "draw column"]], Float[ndarray, " draw"]]
_MAX_CELLS = 2_000_000
_MOST_UNSAID = 0.01
"""Share of draws in which the statistic may be without a value before there is no interval."""


class Composite(NamedTuple):
    """The metrics whose means enter, and what comes out."""

    parts: tuple[str, ...]
    says: str


_N = "records resampled together; n is the smallest of the three"
COMPOSITES: dict[str, Composite] = {
    "score_tf_token": Composite(
        ("edit_success_tf_token", "paraphrase_tf_token", "neighbourhood_tf_token"),
        f"harmonic mean of the three (003, eq. 13-15), {_N}",
    ),
    "score_prob_harmonic": Composite(
        ("efficacy_prob_success", "generalization_prob_success", "specificity_prob_success"),
        f"harmonic mean of the three (003's Score of ES, GS, LS, eq. 16-18), {_N}",
    ),
}


def harmonic(means: Float[ndarray, "draw column"]) -> Float[ndarray, " draw"]:
    """The harmonic mean of each row; 0 where a mean is."""
    with np.errstate(divide="ignore"):
        return means.shape[1] / (1 / means).sum(1)


def composites(values: Mapping[str, Mapping[str, float]], records: Sequence[str], seed: int = 0) -> dict[str, Interval]:
    """Those whose parts are all there."""
    return {
        name: of_means(columns(values, parts, records), harmonic, seed)
        for name, (parts, _) in COMPOSITES.items()
        if all(part in values for part in parts)
    }


def columns(
    values: Mapping[str, Mapping[str, float]], names: Sequence[str], records: Sequence[str]
) -> Float[ndarray, "n column"]:
    """Metrics side by side, a row a record; NaN where a record lacks one."""
    return np.array([[values[name].get(record, np.nan) for name in names] for record in records], dtype=np.float64)


def of_means(
    table: Float[ndarray, "n column"], statistic: Statistic, seed: int = 0, n_boot: int = 2000, level: float = 0.95
) -> Interval:
    """A function of the columns' means with a percentile bootstrap interval; rows are resampled whole.

    A column's mean is over the rows that have it. n is the smallest of the columns' counts; below 2 there is no
    interval, nor where more than one draw in a hundred leaves a column empty.
    """
    present = ~np.isnan(table)
    n = int(present.sum(0).min())
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    filled, shown = np.where(present, table, 0.0), present.astype(np.float64)
    mean = float(statistic((filled.sum(0) / shown.sum(0))[None])[0])
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    drawn = []
    for times in _draws(len(table), n_boot, seed):
        counts = times @ shown
        means = np.divide(times @ filled, counts, out=np.full_like(counts, np.nan), where=counts > 0)
        drawn.append(statistic(means))
    found = np.concatenate(drawn)
    good = found[~np.isnan(found)]
    if len(good) < (1 - _MOST_UNSAID) * len(found):
        return Interval(mean, math.nan, math.nan, n)
    low, high = np.quantile(good, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), n)


def _draws(n: int, n_boot: int, seed: int) -> Iterator[Float[ndarray, "draw n"]]:
    """How often each row is drawn, in blocks of draws."""
    rng, block = np.random.default_rng(seed), max(1, _MAX_CELLS // n)
    for start in range(0, n_boot, block):
        yield rng.multinomial(n, np.full(n, 1 / n), size=min(block, n_boot - start)).astype(np.float64)
