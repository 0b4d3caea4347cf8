"""Lines with interval bands in panels: effects by layer (IntAttn-Edit, Figure 2), and metrics over sequential edits."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from numpy import ndarray

from . import theme
from .layout import (
    EMBEDDING,
    Across,
    Grid,
    axis_coordinates,
    axis_suffix,
    frame,
    heading,
    legend,
    legend_rows,
    x_axis,
    y_axis,
)
from .text import escape, interval_line, number, unescape, wrap

NORM_RATIO = "weight norm ratio"
"""The panel of ‖W_t‖ / ‖W_0‖, whose axis is around 1 instead of from 0 to 1."""

_LEFT, _RIGHT, _LINE = 76, 24, 20  # pixels: margins, and a line of headings or legend
_INNER = theme.WIDTH - _LEFT - _RIGHT
_LABEL_LINE, _CHARACTER, _BETWEEN = 17, 6.4, 10  # pixels: a line of mark labels, a letter in it, least gap of labels


def curves(
    series: Sequence[Series],
    *,
    title: str,
    subtitle: str = "",
    x_title: str = "layer",
    y_title: str = "effect",
    marks: Sequence[Mark] = (),
) -> go.Figure:
    """Lines with shaded 95% intervals in one panel."""
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


def steps_figure(
    runs: Mapping[str, Mapping[str, Series]],
    *,
    title: str,
    subtitle: str = "",
    x_title: str = "edits so far",
    ratios: Collection[str] = (NORM_RATIO,),
    columns: int = 3,
) -> go.Figure:
    """Sequential editing: {run: {panel: Series}} as one panel per metric, one line per run.

    Panels named in `ratios` come last. A run determines the name, colour, dash and marker of its lines; `name` and
    `kind` of the series are ignored.

    Raises:
        ValueError: there is no series.
    """
    panels = by_panel(runs, last=ratios)
    figure = curve_panels(
        panels,
        title=title,
        subtitle=subtitle,
        x_title=x_title,
        y_titles=list(panels),
        columns=columns,
        dashes=True,
        levels=dict.fromkeys(ratios, 1.0),
    )
    for index, (name, lines) in enumerate(panels.items()):
        around = (0.95, 1.05) if name in ratios else (0.0, 1.0)
        figure.layout[f"yaxis{axis_suffix(index)}"].range = limits(lines, *around)
    if len({float(x) for lines in panels.values() for line in lines for x in line.x}) == 1:
        # With a single step the runs would hide each other: shift them sideways; hovers keep the step.
        for index, run in enumerate(runs):
            shift = (index - (len(runs) - 1) / 2) * min(0.12, 0.8 / len(runs))
            for trace in figure.select_traces({"name": escape(run)}):
                trace.x = [x + shift for x in trace.x]
    return figure


def by_panel(runs: Mapping[str, Mapping[str, Series]], last: Collection[str] = ()) -> dict[str, list[Series]]:
    """{run: {panel: Series}} as {panel: a line a run}, which has the run's name; panels in `last` come last.

    Raises:
        ValueError: there is no series.
    """
    names = sorted(dict.fromkeys(name for lines in runs.values() for name in lines), key=lambda n: n in last)
    panels = {n: [replace(by[n], name=run, kind=None) for run, by in runs.items() if n in by] for n in names}
    if not any(len(line.x) for lines in panels.values() for line in lines):
        raise ValueError("no run has a series to draw")
    return panels


def curve_panels(
    panels: Mapping[str, Sequence[Series]],
    *,
    title: str,
    x_title: str,
    y_titles: Sequence[str],
    subtitle: str = "",
    marks: Sequence[Mark] | Mapping[str, Sequence[Mark]] = (),
    columns: int | None = None,
    dashes: bool = False,
    levels: Mapping[str, float] | None = None,
    headings: Mapping[str, str] | None = None,
    scales: Mapping[str, str] | None = None,
    shared_rows: bool = False,
) -> go.Figure:
    """Panels with one x axis, at most `columns` a row; a line's name has one look and one legend entry in all panels.

    Args:
        panels: the lines of each panel.
        marks: the marks of every panel, or by panel.
        dashes: draw each line with its own dash and open markers, so that overlapping lines all show.
        levels: y of a panel's thin horizontal line; by default 0.
        headings: titles of panels.
        scales: the y axis of a panel: "linear" (the default), "log" or "rank" (see layout.py). Hovers show true values.
        shared_rows: give all panels of a row one y range.
    """
    marks_of = marks if isinstance(marks, Mapping) else dict.fromkeys(panels, marks)
    groups = list(panels.values())
    all_series = [s for group in groups for s in group]
    x_values = {float(v) for series in all_series for v in series.x}
    wide = any(mark.stop is not None for panel_marks in marks_of.values() for mark in panel_marks)
    across = Across.of(x_values, _INNER * Grid.of(len(panels), columns).share, wide)
    label_lines = [lines_of(marks_of.get(panel, ()), across) for panel in panels]
    over = [_LABEL_LINE * n + 3 * bool(n) + _LINE * bool(headings) for n in label_lines]
    grid = Grid.of(len(panels), columns, max(over))
    names = list(dict.fromkeys(s.name for s in all_series))
    over_first_row = max(over[: grid.columns])
    above = 14 + over_first_row + _LINE * legend_rows(names, _INNER)
    layout = frame(heading(title, subtitle), above=above, plot=grid.height, below=58, left=_LEFT, right=_RIGHT)
    figure = go.Figure(layout=layout)
    figure.update_layout(legend=legend(grid.height, 6 + over_first_row) | {"tracegroupgap": 0}, hovermode="closest")
    shown: set[str] = set()
    for index, (panel, group) in enumerate(panels.items()):
        suffix, scale = axis_suffix(index), (scales or {}).get(panel, "linear")
        row_start = index - index % grid.columns
        same_range = groups[row_start : row_start + grid.columns] if shared_rows else [group]
        y = y_axis(_y_values(same_range), scale, grid.panel, fixed=shared_rows)
        x = x_axis(x_values, x_title if index + grid.columns >= len(panels) else "", across, x_title == "layer")
        _add_axes(figure, grid, index, x, y, y_titles[index])
        style = _Style(x_title, dashes, scale, y, across.pixels)
        for series in group:
            look = theme.look(series.kind, names.index(series.name))
            _add_band(figure, series, look, suffix, style)
            _add_line(figure, series, look, suffix, style, series.name not in shown)
            shown.add(series.name)
        if scale == "linear":
            _add_level(figure, suffix, (levels or {}).get(panel, 0))
        add_marks(figure, marks_of.get(panel, ()), suffix, across)
        _add_heading(figure, (headings or {}).get(panel, ""), suffix, over[index] - _LINE)
    return figure


@dataclass(frozen=True, eq=False)
class Series:
    """One line: means over x with 95% intervals, each over n records.

    `kind` sets its look: a kind of site (mlp, attn, hidden, ...) or of answer (original, target, control). On an axis
    of layers, x = -1 is the embedding.
    """

    name: str
    x: Sequence[float]
    mean: Float[ndarray, " x"]
    low: Float[ndarray, " x"] | None = None
    high: Float[ndarray, " x"] | None = None
    n: ndarray | int | None = None
    kind: str | None = None

    def __post_init__(self) -> None:
        for field in ("mean", "low", "high", "n"):
            if getattr(self, field) is not None:
                values = np.asarray(getattr(self, field), dtype=float)
                if values.shape not in ((), (len(self.x),)):
                    raise ValueError(
                        f"{self.name}: {field} {values.shape} must have one value for each of {len(self.x)}"
                    )
                object.__setattr__(self, field, np.broadcast_to(values, (len(self.x),)))

    def hovers(self, x_word: str) -> list[str]:
        """The hover text of every point; `x_word` names x."""
        return [self._hover(index, x_word) for index in range(len(self.x))]

    def _hover(self, index: int, x_word: str) -> str:
        where = f"{escape(x_word)} {self.x[index]:g}"
        if x_word == "layer" and self.x[index] == EMBEDDING:
            where = "embedding"
        lines = [f"<b>{escape(self.name)}</b>, {where}"]
        lines.append(f"mean <b>{number(float(self.mean[index]), 4)}</b>")
        if self.low is not None and self.high is not None:
            lines.append(interval_line(float(self.low[index]), float(self.high[index]), 4))
        if self.n is not None and np.isfinite(self.n[index]):  # type: ignore[index]
            lines.append(f"n = {int(self.n[index])}")  # type: ignore[index]
        return "<br>".join(lines)


@dataclass(frozen=True)
class Mark:
    """A labelled position on the x axis: a line at `start`, or a tinted range up to and including `stop`.

    `kind` sets its colour: a stage (enrichment, extraction, promotion) or a kind of site; otherwise grey. `strip` draws
    the range as a bar along the panel's top instead.
    """

    label: str
    start: float
    stop: float | None = None
    kind: str | None = None
    strip: bool = False

    @property
    def middle(self) -> float:
        return self.start if self.stop is None else (self.start + self.stop) / 2


class _Style(NamedTuple):
    """Settings shared by the lines of one panel: the word for x, dashes, the y axis, and the width in pixels."""

    x_word: str
    dashes: bool
    scale: str
    axis: Mapping[str, Any]
    pixels: float

    def markers(self, series: Series) -> bool:
        """Whether points have markers. Lines of answers differ by dash, which dense markers would hide."""
        room = self.pixels / len(series.x)
        return len(series.x) <= 40 and (room >= 14 or series.kind not in theme.ANSWERS)

    def ends(self, values: Sequence[float]) -> list[float | None]:
        """Ends of intervals in axis coordinates; a logarithmic axis shows ends of 0 or less at its lower limit."""
        if self.scale != "log":
            return axis_coordinates(values, self.scale)
        return axis_coordinates(np.maximum(np.asarray(values, dtype=float), 10 ** self.axis["range"][0]), self.scale)


def _add_axes(figure: go.Figure, grid: Grid, index: int, x: dict[str, Any], y: dict[str, Any], y_title: str) -> None:
    suffix = axis_suffix(index)
    across, up = grid.domains(index)
    words = "<br>".join(wrap(y_title, grid.panel // 7, lines=2))
    figure.layout[f"xaxis{suffix}"] = {**x, "domain": across, "anchor": f"y{suffix}"}
    figure.layout[f"yaxis{suffix}"] = theme.axis(anchor=f"x{suffix}", domain=up, title=words, **y)


def _add_heading(figure: go.Figure, words: str, suffix: str, over: int) -> None:
    if words:
        at = {"xref": f"x{suffix} domain", "yref": f"y{suffix} domain", "x": 0, "xanchor": "left", "y": 1}
        figure.add_annotation(theme.note(f"<b>{escape(words)}</b>", **at, yanchor="bottom", yshift=over))


def _y_values(groups: Sequence[Sequence[Series]]) -> list[float]:
    """Every mean and end of an interval, for the range of an axis."""
    arrays = [array for group in groups for s in group for array in (s.mean, s.low, s.high) if array is not None]
    return [float(v) for array in arrays for v in array]


def limits(lines: Sequence[Series], low: float = 0.0, high: float = 1.0) -> tuple[float, float]:
    """An axis range from `low` to `high`, extended to all means and intervals, with a margin for markers."""
    values = np.array([low, high, *_y_values([lines])])
    values = values[np.isfinite(values)]
    pad = 0.04 * float(values.max() - values.min())
    return float(values.min()) - pad, float(values.max()) + pad


def _add_band(figure: go.Figure, series: Series, look: theme.Look, suffix: str, style: _Style) -> None:
    for x, low, high in _stretches(series):
        figure.add_scatter(
            x=[*x, *x[::-1]],
            y=[*style.ends(low), *style.ends(high)[::-1]],
            fill="toself",
            fillcolor=theme.transparent(look.line, 0.16),
            mode="none",
            hoverinfo="skip",
            showlegend=False,
            legendgroup=escape(series.name),
            name=f"{escape(series.name)}, 95% interval",
            xaxis=f"x{suffix}",
            yaxis=f"y{suffix}",
        )


def _add_line(figure: go.Figure, series: Series, look: theme.Look, suffix: str, style: _Style, in_legend: bool) -> None:
    name, few, size = escape(series.name), style.markers(series), 8 if len(series.x) <= 16 else 6
    marker = {"color": look.line, "symbol": look.symbol, "size": size, "line": {"color": theme.PAPER, "width": 1}}
    if style.dashes:
        marker |= {"symbol": f"{look.symbol}-open", "line": {"color": look.line, "width": 1.5}}
    dashed = style.dashes or not few or series.kind in theme.ANSWERS
    figure.add_scatter(
        x=[float(v) for v in series.x],
        y=axis_coordinates(series.mean, style.scale),
        error_y=_lone_intervals(series, look.line, style),
        mode="lines+markers" if few else "lines",
        line={"color": look.line, "width": 2.2, "dash": look.dash if dashed else "solid"},
        marker=marker,
        hovertext=series.hovers(style.x_word),
        hoverinfo="text",
        name=name,
        legendgroup=name,
        showlegend=in_legend,
        xaxis=f"x{suffix}",
        yaxis=f"y{suffix}",
    )


def _stretches(series: Series) -> list[tuple[list[float], list[float], list[float]]]:
    """Runs of neighbouring points with an interval, as (x, low, high), so that a band never spans a gap."""
    if series.low is None or series.high is None:
        return []
    points = zip(series.x, series.low, series.high, strict=True)
    runs = groupby(points, key=lambda point: bool(np.isfinite(point[1]) and np.isfinite(point[2])))
    stretches = [zip(*run, strict=True) for measured, run in runs if measured]
    return [tuple([float(v) for v in values] for values in stretch) for stretch in stretches]  # type: ignore[misc]


def _lone_intervals(series: Series, colour: str, style: _Style) -> dict[str, Any] | None:
    """Error bars for points without neighbours, whose band would have no width."""
    lone = {x[0]: (style.ends(low)[0], style.ends(high)[0]) for x, low, high in _stretches(series) if len(x) == 1}
    if not lone:
        return None
    means = axis_coordinates(series.mean, style.scale)
    ends = [(*lone.get(float(x), (None, None)), mean) for x, mean in zip(series.x, means, strict=True)]
    up = [None if high is None or mean is None else high - mean for _, high, mean in ends]
    down = [None if low is None or mean is None else mean - low for low, _, mean in ends]
    return {"array": up, "arrayminus": down, "color": colour, "thickness": 2, "width": 0}


def _add_level(figure: go.Figure, suffix: str, y: float) -> None:
    """A thin line across the panel at `y`."""
    line = {"color": theme.MUTED, "width": 1}
    figure.add_shape(
        type="line", xref=f"x{suffix} domain", yref=f"y{suffix}", x0=0, x1=1, y0=y, y1=y, line=line, layer="below"
    )


def lines_of(marks: Sequence[Mark], across: Across) -> int:
    """The number of lines of labels that these marks need above their panel."""
    return max((label.line + 1 for label in _labels(marks, across)), default=0)


def add_marks(figure: go.Figure, marks: Sequence[Mark], suffix: str, across: Across) -> None:
    """Draw marks into the panel whose axes have this suffix."""
    for mark, label in zip(marks, _labels(marks, across), strict=True):
        _add_stretch(figure, mark, suffix)
        font = {"size": theme.SMALL_SIZE, "color": theme.mark_colour(mark.kind)}
        at = {"xref": f"x{suffix}", "yref": f"y{suffix} domain", "x": label.x, "xanchor": label.anchor, "y": 1}
        up = {"yanchor": "bottom", "yshift": _LABEL_LINE * label.line}
        figure.add_annotation(theme.note(escape(mark.label), **at, **up, font=font))


class Label(NamedTuple):
    """A mark's label: its x, the horizontal anchor, and its line above the panel, counted from 0."""

    x: float
    anchor: str
    line: int


def _labels(marks: Sequence[Mark], across: Across) -> list[Label]:
    """Each mark's label over its middle, moved inside the panel's edges, and a line up if it would touch another."""
    labels: list[Label] = []
    occupied: list[list[tuple[float, float]]] = []  # the spans of labels in pixels, by line
    for mark in marks:
        half, middle = _CHARACTER * len(unescape(escape(mark.label))) / 2, across.pixel(mark.middle)
        x, anchor, span = mark.middle, "center", (middle - half, middle + half)
        if middle < half:
            x, anchor, span = across.low, "left", (0.0, 2 * half)
        elif middle + half > across.pixels:
            x, anchor, span = across.high, "right", (across.pixels - 2 * half, across.pixels)
        free = (
            line
            for line, spans in enumerate(occupied)
            if all(span[0] - other[1] >= _BETWEEN or other[0] - span[1] >= _BETWEEN for other in spans)
        )
        line = next(free, len(occupied))
        if line == len(occupied):
            occupied.append([])
        occupied[line].append(span)
        labels.append(Label(x, anchor, line))
    return labels


def _add_stretch(figure: go.Figure, mark: Mark, suffix: str) -> None:
    colour = theme.mark_colour(mark.kind)
    bottom, opacity = (0.965, 0.85) if mark.strip else (0, 0.09)
    up = {"xref": f"x{suffix}", "yref": f"y{suffix} domain", "y0": bottom, "y1": 1, "layer": "below"}
    if mark.stop is None:
        line = {"color": colour, "width": 1.5, "dash": "dot"}
        figure.add_shape(type="line", x0=mark.start, x1=mark.start, line=line, **up)
        return
    ends = {"x0": mark.start - 0.5, "x1": mark.stop + 0.5, "line": {"width": 0}}
    figure.add_shape(type="rect", fillcolor=theme.transparent(colour, opacity), **ends, **up)
