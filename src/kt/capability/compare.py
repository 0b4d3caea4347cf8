"""Intervals over a task's documents, and the paired difference of two runs over the same ones.

A document's value is what lm-eval logs for it. Most metrics are means of such values; the rest (perplexities, F1) are
what the task's own aggregation makes of them, which is then applied to every resample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..stats import Interval, bootstrap_mean, paired_bootstrap_difference

Values = dict[tuple[str, int], Any]
"""(task, document) -> the value of one metric."""
Aggregate = Callable[[Sequence[Any]], float]

DRAWS = 500
"""Resamples where the aggregation is not a mean: each calls it once, in Python."""


def values_of(samples: Mapping[str, list[dict[str, Any]]], tasks: Sequence[str], metric: str) -> Values:
    """The documents' values of `metric,filter` over tasks; documents without one are absent."""
    name, _, filtered = metric.rpartition(",")
    rows = ((task, row) for task in tasks for row in samples.get(task, ()))
    return {(t, int(row["doc_id"])): row[name] for t, row in rows if row["filter"] == filtered and name in row}


def interval(shown: float, values: Values, aggregate: Aggregate | None, seed: int) -> Interval:
    """lm-eval's figure with its n and a 95% bootstrap interval; `aggregate` is None for a mean.

    Where the documents' values do not give the figure, there is no interval (NaN).
    """
    documents = list(values.values())
    n = len(documents)
    if n == 0 or not _agree(shown, _whole(documents, aggregate)):
        return Interval(shown, math.nan, math.nan, n)
    if aggregate is None:
        mean = bootstrap_mean(documents, seed=seed)
        return Interval(shown, mean.low, mean.high, n)
    return _quantiles(shown, [aggregate([documents[i] for i in picks]) for picks in _draws(n, seed)], n)


def difference(
    shown: tuple[float, float], before: Values, after: Values, aggregate: Aggregate | None, seed: int
) -> Interval:
    """after - before, the documents of both resampled together."""
    gain = shown[1] - shown[0]
    both = [key for key in before if key in after]
    old, new = [before[key] for key in both], [after[key] for key in both]
    whole = len(both) == len(before) == len(after) and len(both) > 0
    if not (whole and _agree(shown[0], _whole(old, aggregate)) and _agree(shown[1], _whole(new, aggregate))):
        return Interval(gain, math.nan, math.nan, len(both))
    if aggregate is None:
        change = paired_bootstrap_difference(new, old, seed=seed)
        return Interval(gain, change.low, change.high, len(both))
    draws = [aggregate([new[i] for i in p]) - aggregate([old[i] for i in p]) for p in _draws(len(both), seed)]
    return _quantiles(gain, draws, len(both))


def _whole(values: Sequence[Any], aggregate: Aggregate | None) -> float:
    if aggregate is not None:
        return float(aggregate(values))
    numbers = [v for v in values if isinstance(v, int | float | np.number | np.bool_)]
    return math.fsum(map(float, numbers)) / len(numbers) if len(numbers) == len(values) else math.nan


def _agree(shown: float, value: float) -> bool:
    return math.isfinite(value) and math.isclose(shown, value, rel_tol=1e-6, abs_tol=1e-9)


def _draws(n: int, seed: int) -> Iterator[list[int]]:
    rng = np.random.default_rng(seed)
    for _ in range(DRAWS if n > 1 else 0):
        yield rng.integers(n, size=n).tolist()


def _quantiles(shown: float, draws: Sequence[float], n: int) -> Interval:
    """No interval where there are no draws, or a resample for which the metric does not exist."""
    if not draws or not np.isfinite(draws).all():
        return Interval(shown, math.nan, math.nan, n)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(shown, float(low), float(high), n)
