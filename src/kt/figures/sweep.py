"""Sweeps: each metric over the settings of a grid, with 95% bands, and the traced α with its interval marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from . import theme
from .curves import Mark, Series, by_panel, curve_panels, limits
from .layout import axis_suffix
from .text import escape

SCALES = ("linear", "log")


class Traced(NamedTuple):
    """A measured value on the x axis, and its 95% interval if it has one."""

    value: float
    ci95: tuple[float, float] | None = None
    label: str = "traced α"


def sweep_figure(
    runs: Mapping[str, Mapping[str, Series]],
    *,
    title: str,
    subtitle: str = "",
    x_title: str = "",
    scale: str = "linear",
    names: Sequence[str] = (),
    traced: Traced | None = None,
    columns: int = 2,
) -> go.Figure:
    """{run: {panel: Series}} as one panel per metric, one line per run.

    Args:
        scale: of the x axis; on `log`, ticks are at powers of ten and at the ends of the measured range.
        names: labels of x = 0, 1, 2, ... instead of numbers.
        traced: a value to mark.

    Raises:
        ValueError: there is no series, the scale is unknown, or an x on a log scale is not above zero.
    """
    panels = by_panel(runs)
    settings = sorted({float(x) for group in panels.values() for line in group for x in line.x})
    if scale not in SCALES:
        raise ValueError(f"scale {scale!r} is unknown; choose among {', '.join(SCALES)}")
    if scale == "log" and settings[0] <= 0:
        raise ValueError(f"{settings[0]:g} has no place on a log scale; draw it on the linear one")
    marks = [] if traced is None else [Mark(f"{traced.label} = {traced.value:.2f}", traced.value)]
    figure = curve_panels(
        panels,
        title=title,
        subtitle=subtitle,
        x_title=x_title,
        y_titles=list(panels),
        marks=marks,
        columns=columns,
        dashes=len(runs) > 1,
    )
    for index, lines in enumerate(panels.values()):
        suffix = axis_suffix(index)
        figure.layout[f"yaxis{suffix}"].range = limits(lines)
        if scale == "log":
            _logarithmic(figure, suffix, settings)
        elif names:
            _named(figure, suffix, names)
        if traced is not None and traced.ci95 is not None:
            _shade(figure, suffix, traced.ci95)
    return figure


def _logarithmic(figure: go.Figure, suffix: str, settings: Sequence[float]) -> None:
    """Make the x axis logarithmic; values and hovers stay unchanged."""
    low, high = float(np.log10(settings[0])), float(np.log10(settings[-1]))
    pad = 0.04 * (high - low) or 0.3
    powers = [10.0**p for p in range(int(np.floor(low)), int(np.ceil(high)) + 1)]
    ticks = [p for p in powers if 10 ** (low - pad) <= p <= 10 ** (high + pad)]
    ticks += [
        setting for setting in (settings[0], settings[-1]) if all(abs(np.log10(setting / t)) > 0.15 for t in ticks)
    ]
    axis = figure.layout[f"xaxis{suffix}"]
    axis.update(type="log", range=[low - pad, high + pad], dtick=None, tick0=None, nticks=None)
    axis.update(tickmode="array", tickvals=sorted(ticks), ticktext=[f"{t:,g}" for t in sorted(ticks)])


def _named(figure: go.Figure, suffix: str, names: Sequence[str]) -> None:
    axis = figure.layout[f"xaxis{suffix}"]
    axis.update(dtick=None, tick0=None, nticks=None, range=[-0.5, len(names) - 0.5])
    axis.update(tickmode="array", tickvals=list(range(len(names))), ticktext=[escape(name) for name in names])


def _shade(figure: go.Figure, suffix: str, ends: tuple[float, float]) -> None:
    """Shade the interval of a mark behind the lines."""
    up = {"xref": f"x{suffix}", "yref": f"y{suffix} domain", "y0": 0, "y1": 1, "layer": "below"}
    colour = theme.transparent(theme.MUTED, 0.12)
    figure.add_shape(type="rect", x0=ends[0], x1=ends[1], fillcolor=colour, line={"width": 0}, **up)
