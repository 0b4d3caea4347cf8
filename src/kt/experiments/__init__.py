"""Sweeps: one edit per setting of a grid, all scored on the same facts.

points = alpha_points()                                   # a grid: settings with a place on the x axis
found = sweep(model, facts, points, folder="runs/alpha")  # rows, kept one by one: an interrupted sweep goes on
found.figure(); found.to_dataframe(); found.difference("0.3", "0")
"""

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
from .sweep import distinct, sweep, traced_balance
from .sweep_result import Row, Sweep

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
    "sweep",
    "traced_balance",
]
