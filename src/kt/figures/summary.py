"""The balance factor α (IntAttn-Edit, eq. 12), scores before and after an edit, and estimated beside exact effects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from numpy import ndarray

from ..stats import Interval
from . import theme
from .curves import Series
from .layout import every, frame, heading, legend
from .text import clip, escape, interval_line, number

_BARS, _GAP, _RULER = 250, 92, 40  # pixels of the balance figure: bars, then axis and heading, then the ruler for α
_PLOT = 520  # pixels: height of the screen's plot


class Change(NamedTuple):
    """A score before and after an edit."""

    name: str
    before: Interval
    after: Interval


def balance_figure(
    per_layer: Mapping[str, Series],
    alpha: Interval,
    *,
    title: str,
    subtitle: str = "",
    layers: Mapping[str, Sequence[int]] | None = None,
    y_title: str = "logit difference restored (eq. 8)",
) -> go.Figure:
    """Each layer's contribution to the two sums of eq. 12, the layers proposed for editing, and α on a ruler.

    Args:
        per_layer: effects by layer of `attn` and `mlp`.
        layers: the proposed layers, by module.
    """
    plot = _BARS + _GAP + _RULER
    strips = [(kind, chosen) for kind, chosen in (layers or {}).items() if len(chosen)]
    above = 34 + 9 * len(strips)
    figure = go.Figure(layout=frame(heading(title, subtitle), above=above, plot=plot, below=46, left=76))
    figure.update_layout(barmode="group", bargap=0.28, bargroupgap=0.06, legend=legend(plot, 6 + 9 * len(strips)))
    for kind, series in per_layer.items():
        _add_bars(figure, kind, series, (layers or {}).get(kind, ()))
    x = [float(v) for series in per_layer.values() for v in series.x]
    low, high = min(x), max(x)
    figure.layout.xaxis = theme.axis(
        title="layer", range=[low - 0.6, high + 0.6], showgrid=False, tick0=0, dtick=every(int(high - low) + 1, 800)
    )
    bars = (1 - _BARS / plot, 1)
    figure.layout.yaxis = theme.axis(
        domain=bars, title=escape(y_title), zeroline=True, zerolinecolor=theme.MUTED, tickformat="~g", nticks=7
    )
    for index, (kind, chosen) in enumerate(strips):
        _add_strip(figure, kind, chosen, 4 + 9 * index)
    _add_ruler(figure, alpha, _RULER / plot)
    return figure


def _add_bars(figure: go.Figure, kind: str, series: Series, chosen: Sequence[int]) -> None:
    look = theme.look(kind)
    errors = None
    if series.low is not None and series.high is not None:
        up, down = np.nan_to_num(series.high - series.mean), np.nan_to_num(series.mean - series.low)
        caps = 2 if len(series.x) <= 16 else 0
        errors = {"array": up.tolist(), "arrayminus": down.tolist(), "color": theme.INK, "thickness": 1, "width": caps}
    stripes = {"shape": "/", "bgcolor": look.line, "fgcolor": "#f2b8ae", "fgopacity": 1, "size": 6, "solidity": 0.2}
    figure.add_bar(
        x=[float(v) for v in series.x],
        y=[float(v) if np.isfinite(v) else None for v in series.mean],
        error_y=errors,
        marker={"color": look.line, "pattern": stripes if kind == "attn" else None},
        name=escape(series.name) + (f" (proposed: {layer_range(chosen)})" if len(chosen) else ""),
        hovertext=series.hovers("layer"),
        hoverinfo="text",
    )


def _add_strip(figure: go.Figure, kind: str, chosen: Sequence[int], above: int) -> None:
    """Draw the proposed layers as a bar over the plot; the legend names them."""
    look = theme.look(kind)
    up = {"yref": "paper", "ysizemode": "pixel", "yanchor": 1, "y0": above, "y1": above + 5}
    line = {"width": 0}
    figure.add_shape(
        type="rect", xref="x", x0=min(chosen) - 0.5, x1=max(chosen) + 0.5, fillcolor=look.line, line=line, **up
    )


def layer_range(chosen: Sequence[int]) -> str:
    """`layers 4 to 8`, or `layer 4`."""
    first, last = min(chosen), max(chosen)
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def _add_ruler(figure: go.Figure, alpha: Interval, share: float) -> None:
    """Draw α and its interval on an axis from 0 to 1, extended if they are outside."""
    finite = [v for v in (alpha.mean, alpha.low, alpha.high) if np.isfinite(v)]
    low, high = min([0.0, *finite]), max([1.0, *finite])
    pad = 0.02 * (high - low)
    limits = [low - pad, high + pad]
    figure.layout.xaxis2 = theme.axis(anchor="y2", range=limits, showgrid=False, tickformat="~g", nticks=12)
    figure.layout.yaxis2 = {"domain": [0, share], "anchor": "x2", "range": [-1, 1], "visible": False}
    span = {"x0": 0, "x1": 1, "y0": -0.8, "y1": 0.8, "line_width": 0, "layer": "below"}
    figure.add_shape(type="rect", xref="x2", yref="y2", fillcolor=theme.RULE, **span)
    words = f"α = {number(alpha.mean)}, {interval_line(alpha.low, alpha.high)}, n = {alpha.n}"
    _add_alpha(figure, alpha, words)
    up = {"yref": "paper", "y": share, "yanchor": "bottom", "yshift": 6}
    figure.add_annotation(theme.note(f"<b>{words}</b>", x=0, xanchor="left", **up))
    figure.add_annotation(theme.note("0 = all MLP · 1 = all attention", x=1, xanchor="right", font=theme.QUIET, **up))


def _add_alpha(figure: go.Figure, alpha: Interval, words: str) -> None:
    spread = None
    if alpha.ci95 is not None:
        ends = {"array": [alpha.high - alpha.mean], "arrayminus": [alpha.mean - alpha.low]}
        spread = {**ends, "width": 8, "color": theme.INK, "thickness": 2}
    figure.add_scatter(
        x=[float(alpha.mean) if np.isfinite(alpha.mean) else None],
        y=[0],
        error_x=spread,
        mode="markers",
        marker={"size": 13, "color": theme.INK, "symbol": "diamond", "line": {"color": theme.PAPER, "width": 1.5}},
        name="α",
        showlegend=False,
        hovertext=[words],
        hoverinfo="text",
        xaxis="x2",
        yaxis="y2",
    )


def before_after(
    changes: Sequence[Change],
    *,
    title: str,
    subtitle: str = "",
    x_title: str = "share of prompts",
    x_range: tuple[float, float] | None = (0, 1),
) -> go.Figure:
    """One row per score: a hollow dot before the edit and a full one after it, each with its 95% interval.

    Args:
        x_range: the range of the x axis; None fits it to the scores.
    """
    plot = 44 * len(changes)
    labels = [escape(clip(change.name, 34)) for change in changes]
    left = 40 + round(7.6 * min(34, max(len(change.name) for change in changes)))
    layout = frame(heading(title, subtitle), above=34, plot=plot, below=58, left=left, right=140)
    figure = go.Figure(layout={**layout, "legend": legend(plot, 6)})
    for row, change in enumerate(changes):
        ends = [float(change.before.mean), float(change.after.mean)]
        line = {"color": "#b9c0cb", "width": 5}
        quiet = {"mode": "lines", "line": line, "hoverinfo": "skip", "showlegend": False}
        figure.add_scatter(x=ends, y=[row, row], name=f"{labels[row]}, change", **quiet)
        words = f"{number(ends[0])} → <b>{number(ends[1])}</b>"
        figure.add_annotation(theme.note(words, x=1, xanchor="left", xshift=16, yref="y", y=row))
    _add_dots(figure, [c.before for c in changes], labels, "before", -0.16)
    _add_dots(figure, [c.after for c in changes], labels, "after", 0.16)
    x_more = {} if x_range is None else {"range": [x_range[0] - 0.02, x_range[1] + 0.02]}
    figure.layout.xaxis = theme.axis(title=escape(x_title), tickformat="~g", **x_more)
    rows = {"tickvals": list(range(len(labels))), "ticktext": labels, "ticklabelstandoff": 8}
    figure.layout.yaxis = theme.axis(
        range=[len(labels) - 0.5, -0.5], tickmode="array", showgrid=False, showline=False, **rows
    ) | {"ticks": ""}
    return figure


def weight_sizes(
    names: Sequence[str], relative: Sequence[float | None], *, title: str, subtitle: str = ""
) -> go.Figure:
    """How large an edit is beside each weight that it writes: ‖ΔW‖/‖W‖, one bar a weight.

    Args:
        names: of the weights, from the top down.
        relative: Frobenius norm of each update over that of its weight; None where the weight's norm is not known.
        title: of the figure.
        subtitle: below the title.
    """
    plot, labels = max(60, 30 * len(names)), [escape(clip(name, 44)) for name in names]
    left = 40 + round(7.2 * max(len(clip(name, 44)) for name in names))
    figure = go.Figure(layout=frame(heading(title, subtitle), above=12, plot=plot, below=58, left=left, right=90))
    figure.add_bar(
        x=list(relative),
        y=list(range(len(names))),
        orientation="h",
        marker={"color": theme.SERIES[0]},
        text=["not known" if value is None else number(value) for value in relative],
        textposition="outside",
        cliponaxis=False,
        hovertext=[escape(name) for name in names],
        hoverinfo="text+x",
    )
    figure.layout.xaxis = theme.axis(title="‖ΔW‖/‖W‖, Frobenius norms", tickformat="~g", rangemode="tozero")
    figure.layout.yaxis = theme.axis(
        range=[len(names) - 0.5, -0.5],
        tickmode="array",
        tickvals=list(range(len(names))),
        ticktext=labels,
        showgrid=False,
        showline=False,
    )
    return figure


def _add_dots(figure: go.Figure, scores: Sequence[Interval], labels: Sequence[str], when: str, shift: float) -> None:
    after = when == "after"
    colour = theme.SERIES[0] if after else theme.MUTED
    up = [float(np.nan_to_num(s.high - s.mean)) for s in scores]
    down = [float(np.nan_to_num(s.mean - s.low)) for s in scores]
    figure.add_scatter(
        x=[float(s.mean) if np.isfinite(s.mean) else None for s in scores],
        y=[row + shift for row in range(len(scores))],
        mode="markers",
        error_x={"array": up, "arrayminus": down, "color": colour, "thickness": 1.6, "width": 4},
        marker={
            "size": 12,
            "color": colour if after else theme.PAPER,
            "line": {"color": theme.PAPER if after else colour, "width": 1.5 if after else 2},
        },
        name=f"{when} the edit",
        hovertext=[
            f"<b>{label}</b>, {when}<br>mean <b>{number(s.mean)}</b><br>{interval_line(s.low, s.high)}<br>n = {s.n}"
            for label, s in zip(labels, scores, strict=True)
        ],
        hoverinfo="text",
    )


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
    """Estimated against exact effects: one point per cell, with a colour and marker for each kind.

    Args:
        names: each cell's name, for hovers.
        axis: the name of the effect, for the axes.
    """
    figure = go.Figure(layout=frame(heading(title, subtitle), above=34, plot=_PLOT, below=52, left=76))
    figure.update_layout(legend=legend(_PLOT, 6), hovermode="closest")
    values = np.concatenate([estimate, exact, [0.0]])
    low, high = float(values.min()), float(values.max())
    pad = 0.04 * (high - low or 1.0)
    ends = [low - pad, high + pad]
    quiet = {"color": theme.MUTED, "width": 1, "dash": "dash"}
    figure.add_scatter(x=ends, y=ends, mode="lines", line=quiet, name="estimate = exact", hoverinfo="skip")
    for index, kind in enumerate(dict.fromkeys(kinds)):
        look, cells = theme.look(kind, index), [i for i, other in enumerate(kinds) if other == kind]
        figure.add_scatter(
            x=exact[cells].tolist(),
            y=estimate[cells].tolist(),
            mode="markers",
            marker={"color": look.line, "symbol": look.symbol, "size": 6, "opacity": 0.55},
            name=f"{escape(look.label)} ({len(cells)} cells)",
            hovertext=[
                f"{escape(names[i])}<br>exact {number(float(exact[i]))}, estimate {number(float(estimate[i]))}"
                for i in cells
            ],
            hoverinfo="text",
        )
    lines = {"zeroline": True, "zerolinecolor": theme.RULE, "showgrid": True, "tickformat": "~g", "range": ends}
    figure.layout.xaxis = theme.axis(title=escape(f"patched exactly: {axis}"), **lines)
    figure.layout.yaxis = theme.axis(title=escape(f"estimated: {axis}"), **lines)
    return figure
