"""Layer-wise effects as lines with interval bands (001, Figure 2), the balance factor, and an edit before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from numpy import ndarray

from . import theme
from .grid import Grid, axis_suffix, legend_rows
from .layout import every, frame, heading, legend
from .text import escape, interval_line, number, wrap

_LEFT, _RIGHT, _LINE = 76, 24, 20
_INNER = theme.WIDTH - _LEFT - _RIGHT


@dataclass(frozen=True, eq=False)
class Series:
    """One line: means over x with their 95% intervals. `kind` (mlp, attn, hidden) decides how it looks."""

    name: str
    x: Sequence[float]
    mean: Float[ndarray, " x"]
    low: Float[ndarray, " x"] | None = None
    high: Float[ndarray, " x"] | None = None
    n: ndarray | int | None = None
    kind: str | None = None

    def __post_init__(self) -> None:
        for field in ("mean", "low", "high", "n"):
            given = getattr(self, field)
            if given is not None:
                values = np.asarray(given, dtype=float)
                if values.shape not in ((), (len(self.x),)):
                    raise ValueError(
                        f"{self.name}: {field} {values.shape} must have one value for each of {len(self.x)}"
                    )
                object.__setattr__(self, field, np.broadcast_to(values, (len(self.x),)))

    def hovers(self, x_word: str) -> list[str]:
        return [self._hover(place, x_word) for place in range(len(self.x))]

    def _hover(self, place: int, x_word: str) -> str:
        lines = [f"<b>{escape(self.name)}</b>, {escape(x_word)} {self.x[place]:g}"]
        lines.append(f"mean <b>{number(float(self.mean[place]), 4)}</b>")
        if self.low is not None and self.high is not None:
            lines.append(interval_line(float(self.low[place]), float(self.high[place]), 4))
        if self.n is not None and np.isfinite(self.n[place]):  # type: ignore[index]
            lines.append(f"n = {int(self.n[place])}")  # type: ignore[index]
        return "<br>".join(lines)


@dataclass(frozen=True)
class Mark:
    """A labelled place on the x axis: a line at `start`, or a tinted stretch up to and including `stop`."""

    label: str
    start: float
    stop: float | None = None
    kind: str | None = None


def curves(
    series: Sequence[Series],
    *,
    title: str,
    subtitle: str = "",
    x_title: str = "layer",
    y_title: str = "effect",
    marks: Sequence[Mark] = (),
) -> go.Figure:
    """Lines with shaded 95% intervals over one pair of axes."""
    return curve_panels({"": series}, title=title, subtitle=subtitle, x_title=x_title, y_titles=[y_title], marks=marks)


def layer_curves(
    kinds: Mapping[str, Mapping[str, Series]],
    *,
    title: str,
    subtitle: str = "",
    metric_titles: Mapping[str, str] | None = None,
    marks: Sequence[Mark] = (),
) -> go.Figure:
    """Figure 2: {kind: {metric: Series}} as one panel per metric, one line per kind."""
    names = {"prob": "probability restored", "logit_diff": "logit difference restored (eq. 8)"}
    names |= dict(metric_titles or {})
    metrics = list(dict.fromkeys(metric for by_metric in kinds.values() for metric in by_metric))
    panels = {m: [by_metric[m] for by_metric in kinds.values() if m in by_metric] for m in metrics}
    y_titles = [names.get(metric, metric) for metric in metrics]
    return curve_panels(panels, title=title, subtitle=subtitle, x_title="layer", y_titles=y_titles, marks=marks)


def curve_panels(
    panels: Mapping[str, Sequence[Series]],
    *,
    title: str,
    x_title: str,
    y_titles: Sequence[str],
    subtitle: str = "",
    marks: Sequence[Mark] = (),
    columns: int | None = None,
    dashes: bool = False,
    levels: Mapping[str, float] | None = None,
) -> go.Figure:
    """Panels over one x axis, at most `columns` a row; a name looks the same in each and has one legend entry.

    `dashes`: lines differ by dash even where markers tell them apart, and markers are open, so that lines on top of
    each other all show. `levels`: where a panel's thin line stands, if not at 0.
    """
    over = _LINE * bool(marks)
    grid = Grid.of(len(panels), columns, over)
    everything = [s for group in panels.values() for s in group]
    names = list(dict.fromkeys(s.name for s in everything))
    above = 14 + over + _LINE * legend_rows(names, _INNER)
    head = heading(title, subtitle)
    figure = go.Figure(layout=frame(head, above=above, plot=grid.height, below=58, left=_LEFT, right=_RIGHT))
    figure.update_layout(legend=legend(grid.height, 6 + over) | {"tracegroupgap": 0}, hovermode="closest")
    shown: set[str] = set()
    for place, (panel, group) in enumerate(panels.items()):
        suffix = axis_suffix(place)
        for series in group:
            look = theme.look(series.kind, names.index(series.name))
            _add_line(figure, series, look, suffix, x_title, series.name not in shown, dashes)
            shown.add(series.name)
        lowest = place + grid.columns >= len(panels)
        x_axis = _x_axis(everything, x_title if lowest else "", _INNER * grid.share)
        _add_axes(figure, grid, place, x_axis, y_titles[place])
        _add_level(figure, suffix, (levels or {}).get(panel, 0))
        for mark in marks:
            _add_mark(figure, mark, suffix)
    return figure


def _add_axes(figure: go.Figure, grid: Grid, place: int, x_axis: dict[str, Any], y_title: str) -> None:
    suffix = axis_suffix(place)
    across, up = grid.domains(place)
    words = "<br>".join(wrap(y_title, grid.panel // 7, lines=2))
    figure.layout[f"xaxis{suffix}"] = {**x_axis, "domain": across, "anchor": f"y{suffix}"}
    figure.layout[f"yaxis{suffix}"] = theme.axis(
        anchor=f"x{suffix}", domain=up, title=words, rangemode="tozero", tickformat="~g", nticks=7
    )


def _x_axis(group: Sequence[Series], title: str, pixels: float) -> dict[str, Any]:
    x = sorted({float(v) for series in group for v in series.x})
    pad = 0.03 * (x[-1] - x[0]) or 0.5
    label = max(28, 8 * len(f"{x[-1]:g}") + 8)
    whole = all(v == round(v) for v in x)
    ticks = {"dtick": every(int(x[-1] - x[0]) + 1, pixels, label), "tick0": 0} if whole else {"nticks": 8}
    return theme.axis(title=escape(title), range=[x[0] - pad, x[-1] + pad], showgrid=False, **ticks)


def _add_line(
    figure: go.Figure, series: Series, look: theme.Look, suffix: str, x_word: str, in_legend: bool, dashes: bool
) -> None:
    axes = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
    name = escape(series.name)
    few, size = len(series.x) <= 40, 8 if len(series.x) <= 16 else 6
    for x, low, high in _stretches(series):
        figure.add_scatter(
            x=[*x, *x[::-1]],
            y=[*low, *high[::-1]],
            fill="toself",
            fillcolor=theme.transparent(look.line, 0.16),
            mode="none",
            hoverinfo="skip",
            showlegend=False,
            legendgroup=name,
            name=f"{name}, 95% interval",
            **axes,
        )
    marker = {"color": look.line, "symbol": look.symbol, "size": size, "line": {"color": theme.PAPER, "width": 1}}
    if dashes:
        marker |= {"symbol": f"{look.symbol}-open", "line": {"color": look.line, "width": 1.5}}
    figure.add_scatter(
        x=[float(v) for v in series.x],
        y=[float(v) if np.isfinite(v) else None for v in series.mean],
        error_y=_lone_intervals(series, look.line),
        mode="lines+markers" if few else "lines",
        line={"color": look.line, "width": 2.2, "dash": look.dash if dashes or not few else "solid"},
        marker=marker,
        hovertext=series.hovers(x_word),
        hoverinfo="text",
        name=name,
        legendgroup=name,
        showlegend=in_legend,
        **axes,
    )


def _stretches(series: Series) -> list[tuple[list[float], list[float], list[float]]]:
    """Neighbouring points that have an interval, as (x, low, high): a band never spans a gap."""
    if series.low is None or series.high is None:
        return []
    found: list[tuple[list[float], list[float], list[float]]] = []
    open_now = False
    for x, low, high in zip(series.x, series.low, series.high, strict=True):
        if not (np.isfinite(low) and np.isfinite(high)):
            open_now = False
            continue
        if not open_now:
            found.append(([], [], []))
            open_now = True
        for values, value in zip(found[-1], (x, low, high), strict=True):
            values.append(float(value))
    return found


def _lone_intervals(series: Series, colour: str) -> dict[str, Any] | None:
    """Error bars for points without a neighbour, whose band would have no width."""
    lone = {x[0]: (low[0], high[0]) for x, low, high in _stretches(series) if len(x) == 1}
    if not lone:
        return None
    ends = [(*lone.get(float(x), (None, None)), float(mean)) for x, mean in zip(series.x, series.mean, strict=True)]
    up = [None if high is None else high - mean for _, high, mean in ends]
    down = [None if low is None else mean - low for low, _, mean in ends]
    return {"array": up, "arrayminus": down, "color": colour, "thickness": 2, "width": 0}


def _add_level(figure: go.Figure, suffix: str, y: float) -> None:
    """A thin line across the panel at `y`."""
    line = {"color": theme.MUTED, "width": 1}
    figure.add_shape(
        type="line", xref=f"x{suffix} domain", yref=f"y{suffix}", x0=0, x1=1, y0=y, y1=y, line=line, layer="below"
    )


def _add_mark(figure: go.Figure, mark: Mark, suffix: str) -> None:
    colour = theme.look(mark.kind).line if mark.kind else theme.MUTED
    up = {"xref": f"x{suffix}", "yref": f"y{suffix} domain", "y0": 0, "y1": 1, "layer": "below"}
    if mark.stop is None:
        line = {"color": colour, "width": 1.5, "dash": "dot"}
        figure.add_shape(type="line", x0=mark.start, x1=mark.start, line=line, **up)
    else:
        tint = theme.transparent(colour, 0.08)
        half = 0.5
        figure.add_shape(
            type="rect", x0=mark.start - half, x1=mark.stop + half, fillcolor=tint, line={"width": 0}, **up
        )
    middle = mark.start if mark.stop is None else (mark.start + mark.stop) / 2
    font = {"size": theme.SMALL_SIZE, "color": colour}
    at = {"xref": f"x{suffix}", "yref": f"y{suffix} domain", "x": middle, "y": 1, "yanchor": "bottom"}
    figure.add_annotation(theme.note(escape(mark.label), **at, font=font))
