"""Locate-then-edit: targets searched for by gradient, written by a closed form. Names are imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._util.lazy import attach

if TYPE_CHECKING:
    from .aims import Position, TargetSite
    from .contexts import rome_contexts
    from .objective import (
        KL,
        NLL,
        ClampNorm,
        DiscountedNLL,
        Objective,
        StopAtArgmax,
        StopAtProbability,
        StopBelow,
        WeightDecay,
    )
    from .plan import LocateThenEdit, Write
    from .solvers import Equality, LeastSquares, NullSpace, RankOne

_HOMES = {
    "Position": ".aims",
    "TargetSite": ".aims",
    "rome_contexts": ".contexts",
    "NLL": ".objective",
    "DiscountedNLL": ".objective",
    "KL": ".objective",
    "WeightDecay": ".objective",
    "ClampNorm": ".objective",
    "StopBelow": ".objective",
    "StopAtProbability": ".objective",
    "StopAtArgmax": ".objective",
    "Objective": ".objective",
    "LocateThenEdit": ".plan",
    "Write": ".plan",
    "LeastSquares": ".solvers",
    "Equality": ".solvers",
    "NullSpace": ".solvers",
    "RankOne": ".solvers",
}

__all__ = [
    "KL",
    "NLL",
    "ClampNorm",
    "DiscountedNLL",
    "Equality",
    "LeastSquares",
    "LocateThenEdit",
    "NullSpace",
    "Objective",
    "Position",
    "RankOne",
    "StopAtArgmax",
    "StopAtProbability",
    "StopBelow",
    "TargetSite",
    "WeightDecay",
    "Write",
    "rome_contexts",
]

__getattr__, __dir__ = attach(__name__, _HOMES)
