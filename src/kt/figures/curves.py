"""Layer-wise effects as lines with interval bands (001, Figure 2), the balance factor, and an edit before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from numpy import ndarray

from . import theme
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
) -> go.Figure:
    """Panels over one x axis, at most `columns` a row; a name looks the same in each and has one legend entry.

    `dashes`: lines differ by dash even where markers tell them apart, so that one shows through the gaps of another.
    """
    grid = _Grid.of(len(panels), columns, bool(marks))
    everything = [s for group in panels.values() for s in group]
    names = list(dict.fromkeys(s.name for s in everything))
    over = _LINE * bool(marks)
    above = 14 + over + _LINE * _legend_rows(names)
    head = heading(title, subtitle)
    figure = go.Figure(layout=frame(head, above=above, plot=grid.height, below=58, left=_LEFT, right=_RIGHT))
    figure.update_layout(legend=legend(grid.height, 6 + over), hovermode="closest")
    shown: set[str] = set()
    for place, group in enumerate(panels.values()):
        suffix = axis_suffix(place)
        axes = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
        for series in group:
            _add_line(figure, series, names.index(series.name), axes, x_title, series.name not in shown, dashes)
            shown.add(series.name)
        across, up = grid.domains(place)
        lowest = place + grid.columns >= len(panels)
        x_axis = _x_axis(everything, x_title if lowest else "", _INNER * grid.share)
        figure.layout[f"xaxis{suffix}"] = {**x_axis, "domain": across, "anchor": f"y{suffix}"}
        y_title = "<br>".join(wrap(y_titles[place], grid.panel // 7, lines=2))
        figure.layout[f"yaxis{suffix}"] = theme.axis(
            anchor=f"x{suffix}", domain=up, title=y_title, rangemode="tozero", tickformat="~g", nticks=7
        )
        add_level(figure, suffix, 0)
        for mark in marks:
            _add_mark(figure, mark, suffix)
    return figure


class _Grid(NamedTuple):
    """Panels of one size in rows, filled from the top left; heights are pixels."""

    columns: int
    rows: int
    panel: int
    between: int

    @classmethod
    def of(cls, count: int, columns: int | None, marked: bool) -> _Grid:
        """The fewest rows of at most `columns`, evenly filled: four panels by threes stand two by two."""
        rows = ceil(count / (columns or count))
        return cls(ceil(count / rows), rows, 290 if rows == 1 else 220, 46 + _LINE * marked)

    @property
    def height(self) -> int:
        return self.rows * self.panel + (self.rows - 1) * self.between

    @property
    def share(self) -> float:
        """The part of the plot's width that one panel takes."""
        return (1 - _GAP * (self.columns - 1)) / self.columns

    def domains(self, place: int) -> tuple[tuple[float, float], tuple[float, float]]:
        """The panel's stretches of the plot, from 0 to 1: left to right, bottom to top."""
        row, column = divmod(place, self.columns)
        left = column * (self.share + _GAP)
        top = 1 - row * (self.panel + self.between) / self.height
        return (left, min(1.0, left + self.share)), (max(0.0, top - self.panel / self.height), top)


_GAP = 0.11
"""Between panels of a row, as a part of the plot's width: the ticks and title of the next panel's y axis."""


def axis_suffix(place: int) -> str:
    """What plotly puts behind the names of the axes of the panel at `place`: nothing, 2, 3, ..."""
    return "" if place == 0 else str(place + 1)


def _legend_rows(names: Sequence[str]) -> int:
    """The rows that plotly breaks the legend into."""
    rows, used = 1, 0.0
    for name in names:
        needed = 60 + 7.2 * len(name)
        if used and used + needed > _INNER:
            rows, used = rows + 1, 0.0
        used += needed
    return rows


def _x_axis(group: Sequence[Series], title: str, pixels: float) -> dict[str, Any]:
    x = sorted({float(v) for series in group for v in series.x})
    pad = 0.03 * (x[-1] - x[0]) or 0.5
    label = max(28, 8 * len(f"{x[-1]:g}") + 8)
    whole = all(v == round(v) for v in x)
    ticks = {"dtick": every(int(x[-1] - x[0]) + 1, pixels, label), "tick0": 0} if whole else {"nticks": 8}
    return theme.axis(title=escape(title), range=[x[0] - pad, x[-1] + pad], showgrid=False, **ticks)


def _add_line(
    figure: go.Figure,
    series: Series,
    place: int,
    axes: dict[str, str],
    x_word: str,
    in_legend: bool,
    dashes: bool,
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
        line={"color": look.line, "width": 2.2, "dash": look.dash if dashes or not few else "solid"},
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


def add_level(figure: go.Figure, suffix: str, y: float) -> None:
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
