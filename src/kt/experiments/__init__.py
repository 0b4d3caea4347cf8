"""Sweeps: one edit per setting of a grid, all scored on the same facts.

from kt.experiments.sweep import sweep

points = alpha_points()                                   # a grid: settings with a place on the x axis
found = sweep(model, facts, points, folder="runs/alpha")  # rows, kept one by one: an interrupted sweep goes on
found.figure(); found.to_dataframe(); found.difference("0.3", "0")
"""

from typing import TYPE_CHECKING

from .._util.lazy import attach

if TYPE_CHECKING:
    from ..editing.evidence import traced_balance
    from .grids import (
        ATTENTION_SETS,
        Point,
        alpha_points,
        clamp_points,
        edit_counts,
        edit_points,
        layer_points,
        module_points,
    )
    from .sweep import distinct
    from .sweep_result import Row, Sweep

_HOMES = {
    "ATTENTION_SETS": ".grids",
    "Point": ".grids",
    "Row": ".sweep_result",
    "Sweep": ".sweep_result",
    "alpha_points": ".grids",
    "clamp_points": ".grids",
    "distinct": ".sweep",
    "edit_counts": ".grids",
    "edit_points": ".grids",
    "layer_points": ".grids",
    "module_points": ".grids",
    "traced_balance": "..editing.evidence",
}

__getattr__, __dir__ = attach(__name__, _HOMES)

__all__ = [
    "ATTENTION_SETS",
    "Point",
    "Row",
    "Sweep",
    "alpha_points",
    "clamp_points",
    "distinct",
    "edit_counts",
    "edit_points",
    "layer_points",
    "module_points",
    "traced_balance",
]
