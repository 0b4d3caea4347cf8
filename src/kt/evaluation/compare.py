"""Two methods on the same records: paired bootstrap differences of every metric that both have."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from ..errors import BadFact
from ..stats import Interval, bootstrap_mean_grid, bootstrap_of_means
from .composites import COMPOSITES, columns, harmonic

if TYPE_CHECKING:
    from .scores import Scores


def differences(first: Scores, second: Scores, seed: int = 0) -> dict[str, Interval]:
    """mean(first - second) of each metric over the records that have it in both, resampled together.

    Composites and perplexity are differences of the figures themselves, from draws that both share.

    Raises:
        BadFact: the two are of different records, ask different questions about them, or read different texts.
    """
    _refuse_others(first, second)
    names = [name for name in first.values if name in second.values]
    found: dict[str, Interval] = {}
    if names:
        gap = columns(first.values, names, first.records) - columns(second.values, names, first.records)
        grid = bootstrap_mean_grid(gap, seed=seed)
        cells = zip(names, grid.mean, grid.low, grid.high, grid.n, strict=True)
        found = {name: Interval(float(m), float(lo), float(hi), int(n)) for name, m, lo, hi, n in cells if n}
    for name, (parts, _) in COMPOSITES.items():
        if set(parts) <= set(names):
            both = [columns(s.values, parts, first.records) for s in (first, second)]
            found[name] = bootstrap_of_means(np.concatenate(both, axis=1), _harmonic_gap, seed=seed)
    if first.heldout is not None and second.heldout is not None:
        found["perplexity_heldout"] = first.heldout.difference(second.heldout, seed)
    return found


def _harmonic_gap(means: Float[ndarray, "draw column"]) -> Float[ndarray, " draw"]:
    """The harmonic mean of the first half of the columns less that of the second."""
    half = means.shape[1] // 2
    return harmonic(means[:, :half]) - harmonic(means[:, half:])


def _refuse_others(first: Scores, second: Scores) -> None:
    one, two = set(first.records), set(second.records)
    if one != two:
        raise BadFact(
            f"scores of different records do not compare: {len(one - two)} of {len(one)} are only in the first, "
            f"{len(two - one)} of {len(two)} only in the second; score both on the same facts"
        )
    asked, other = ({(s.record, *s.key) for s in scores.samples} for scores in (first, second))
    if asked != other:
        record = min(str(r[0]) for r in asked ^ other)
        raise BadFact(
            f"the two scores ask different questions about the same records, {record!r} among them; "
            "score both on one facts file"
        )
