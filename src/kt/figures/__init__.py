"""Figures from numpy arrays and strings. The functions return plotly figures; the caller shows them.

Imports plotly (0.4 s): import this package inside functions that the command line loads early.
"""

from __future__ import annotations

# Not lazy, since `heatmap` and `curves` name both a function and its module: a lazy lookup could find the module.
from .curves import NORM_RATIO, Mark, Series, curve_panels, curves, layer_curves, steps_figure
from .heatmap import Panel, heads_figure, heatmap, heatmap_panel
from .probe import before_after_probe, probe_figure, sets_figure
from .save import figure_html, figure_page, images, write_figure
from .summary import Change, balance_figure, before_after
from .terminal import TerminalHeatmap, terminal_heatmap
from .text import escape, readable_token

__all__ = [
    "NORM_RATIO",
    "Change",
    "Mark",
    "Panel",
    "Series",
    "TerminalHeatmap",
    "balance_figure",
    "before_after",
    "before_after_probe",
    "curve_panels",
    "curves",
    "escape",
    "figure_html",
    "figure_page",
    "heads_figure",
    "heatmap",
    "heatmap_panel",
    "images",
    "layer_curves",
    "probe_figure",
    "readable_token",
    "sets_figure",
    "steps_figure",
    "terminal_heatmap",
    "write_figure",
]
