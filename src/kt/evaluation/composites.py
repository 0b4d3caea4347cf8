"""Figures that are functions of several means: the harmonic Score, with records resampled together.

The Score of ROME, MEMIT and JEEP is 3 / (1/ES + 1/GS + 1/LS) of the three means, not a mean of anything a record has:
its interval draws records with all their values, takes the means and then the function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from ..stats import Interval, bootstrap_of_means


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
        name: bootstrap_of_means(columns(values, parts, records), harmonic, seed=seed)
        for name, (parts, _) in COMPOSITES.items()
        if all(part in values for part in parts)
    }


def columns(
    values: Mapping[str, Mapping[str, float]], names: Sequence[str], records: Sequence[str]
) -> Float[ndarray, "n column"]:
    """Metrics side by side, a row a record; NaN where a record lacks one."""
    return np.array([[values[name].get(record, np.nan) for name in names] for record in records], dtype=np.float64)
