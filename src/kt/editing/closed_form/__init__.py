"""Locate-then-edit: targets searched for by gradient, written by a closed form. Names are imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._util.lazy import attach

# ruff: noqa: F401 -- type checkers read the names here, everybody else gets them on first use
if TYPE_CHECKING:
    from .aims import Position, TargetSite
    from .contexts import rome_contexts
    from .objective import (
        KL,
        NLL,
        Alignment,
        AttentionDrift,
        ClampNorm,
        ContextVariance,
        DiscountedNLL,
        Objective,
        StopAfterArgmax,
        StopAtArgmax,
        StopAtProbability,
        StopBelow,
        Term,
        WeightDecay,
    )
    from .passes import Again
    from .plan import LocateThenEdit, Write
    from .sequential import ActiveNeurons, Evolving, Leaky, NormConstrained, Restoring
    from .solvers import Equality, LeastSquares, NullSpace, RankOne

_NAMES = {
    ".aims": "Position TargetSite",
    ".contexts": "rome_contexts",
    ".objective": "KL NLL Alignment AttentionDrift ClampNorm ContextVariance DiscountedNLL Objective StopAfterArgmax "
    "StopAtArgmax StopAtProbability StopBelow Term WeightDecay",
    ".passes": "Again",
    ".plan": "LocateThenEdit Write",
    ".sequential": "ActiveNeurons Evolving Leaky NormConstrained Restoring",
    ".solvers": "Equality LeastSquares NullSpace RankOne",
}

__getattr__, __dir__ = attach(__name__, {name: home for home, names in _NAMES.items() for name in names.split()})
