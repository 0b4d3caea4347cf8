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
from .layout import every, frame, heading, legend
from .text import escape, interval_line, number

_LEFT, _RIGHT, _PLOT = 76, 24, 290


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
) -> go.Figure:
    """Panels side by side; a line of the same name looks the same in each and has one legend entry."""
    head = heading(title, subtitle)
    above = 34 + 20 * bool(marks)
    figure = go.Figure(layout=frame(head, above=above, plot=_PLOT, below=58, left=_LEFT, right=_RIGHT))
    figure.update_layout(legend=legend(_PLOT, 6 + 20 * bool(marks)), hovermode="closest")
    gap = 0.11
    width = (1 - gap * (len(panels) - 1)) / len(panels)
    names = list(dict.fromkeys(s.name for group in panels.values() for s in group))
    shown: set[str] = set()
    for place, group in enumerate(panels.values()):
        suffix = "" if place == 0 else str(place + 1)
        axes = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
        for series in group:
            _add_line(figure, series, names.index(series.name), axes, x_title, series.name not in shown)
            shown.add(series.name)
        start = place * (width + gap)
        pixels = (theme.WIDTH - _LEFT - _RIGHT) * width
        figure.layout[f"xaxis{suffix}"] = _x_axis(group, x_title, (start, start + width), f"y{suffix}", pixels)
        figure.layout[f"yaxis{suffix}"] = theme.axis(
            anchor=f"x{suffix}", title=escape(y_titles[place]), rangemode="tozero", tickformat="~g", nticks=7
        )
        _add_zero(figure, suffix)
        for mark in marks:
            _add_mark(figure, mark, suffix)
    return figure


def _x_axis(
    group: Sequence[Series], title: str, domain: tuple[float, float], anchor: str, pixels: float
) -> dict[str, Any]:
    x = sorted({float(v) for series in group for v in series.x})
    pad = 0.03 * (x[-1] - x[0]) or 0.5
    whole = all(v == round(v) for v in x)
    ticks = {"dtick": every(int(x[-1] - x[0]) + 1, pixels, 28), "tick0": 0} if whole else {"nticks": 8}
    return theme.axis(
        domain=domain, anchor=anchor, title=escape(title), range=[x[0] - pad, x[-1] + pad], showgrid=False, **ticks
    )


def _add_line(
    figure: go.Figure, series: Series, place: int, axes: dict[str, str], x_word: str, in_legend: bool
) -> None:
    look = theme.look(series.kind, place)
    name = escape(series.name)
    few, size = len(series.x) <= 40, 8 if len(series.x) <= 16 else 6
    if series.low is not None and series.high is not None:
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
    figure.add_scatter(
        x=[float(v) for v in series.x],
        y=[float(v) if np.isfinite(v) else None for v in series.mean],
        mode="lines+markers" if few else "lines",
        line={"color": look.line, "width": 2.2, "dash": "solid" if few else look.dash},
        marker={"color": look.line, "symbol": look.symbol, "size": size, "line": {"color": theme.PAPER, "width": 1}},
        hovertext=series.hovers(x_word),
        hoverinfo="text",
        name=name,
        legendgroup=name,
        showlegend=in_legend,
        **axes,
    )


def _stretches(series: Series) -> list[tuple[list[float], list[float], list[float]]]:
    """Neighbouring points that have an interval, as (x, low, high): a band never spans a gap."""
    assert series.low is not None and series.high is not None
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


def _add_zero(figure: go.Figure, suffix: str) -> None:
    line = {"color": theme.MUTED, "width": 1}
    figure.add_shape(
        type="line", xref=f"x{suffix} domain", yref=f"y{suffix}", x0=0, x1=1, y0=0, y1=0, line=line, layer="below"
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
