"""Estimated against exact effects: how far attribution patching can be trusted, at a glance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from numpy import ndarray

from . import theme
from .layout import frame, heading, legend
from .text import escape, number

_PLOT = 520


def screen_figure(
    estimate: Float[ndarray, " cell"],
    exact: Float[ndarray, " cell"],
    kinds: Sequence[str],
    names: Sequence[str],
    *,
    title: str,
    subtitle: str = "",
    axis: str = "effect",
) -> go.Figure:
    """One point a cell, exact effect across and estimate up, one colour and marker a kind.

    Args:
        names: what each cell is, for the reader who points at it.
        axis: what an effect is, in words.
    """
    figure = go.Figure(layout=frame(heading(title, subtitle), above=34, plot=_PLOT, below=52, left=76))
    figure.update_layout(legend=legend(_PLOT, 6), hovermode="closest")
    values = np.concatenate([estimate, exact, [0.0]])
    low, high = float(values.min()), float(values.max())
    pad = 0.04 * (high - low or 1.0)
    ends = [low - pad, high + pad]
    quiet = {"color": theme.MUTED, "width": 1, "dash": "dash"}
    figure.add_scatter(x=ends, y=ends, mode="lines", line=quiet, name="estimate = exact", hoverinfo="skip")
    which = np.array(kinds, dtype=object)
    for place, kind in enumerate(dict.fromkeys(kinds)):
        look, mine = theme.look(kind, place), np.flatnonzero(which == kind).tolist()
        figure.add_scatter(
            x=exact[mine].tolist(),
            y=estimate[mine].tolist(),
            mode="markers",
            marker={"color": look.line, "symbol": look.symbol, "size": 6, "opacity": 0.55},
            name=f"{escape(look.label)} ({len(mine)} cells)",
            hovertext=[
                f"{escape(names[i])}<br>exact {number(float(exact[i]))}, estimate {number(float(estimate[i]))}"
                for i in mine
            ],
            hoverinfo="text",
        )
    lines = {"zeroline": True, "zerolinecolor": theme.RULE, "showgrid": True, "tickformat": "~g", "range": ends}
    figure.layout.xaxis = theme.axis(title=escape(f"patched exactly: {axis}"), **lines)
    figure.layout.yaxis = theme.axis(title=escape(f"estimated: {axis}"), **lines)
    return figure
