"""Layer-wise effects as lines with interval bands (001, Figure 2), the balance factor, and an edit before and after."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
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
    Heading,
    axis_suffix,
    drawn,
    frame,
    heading,
    legend,
    legend_rows,
    x_axis,
    y_axis,
)
from .text import escape, interval_line, number, unescape, wrap

# Labelled places on an x axis: lines, tinted stretches, and bars along the top of a panel.

LINE = 17
"""Pixels that one line of labels takes above a panel."""

_CHARACTER, _BETWEEN = 6.4, 10  # pixels of a letter at SMALL_SIZE, and the least room between two labels


@dataclass(frozen=True)
class Mark:
    """A labelled place on the x axis: a line at `start`, or a tinted stretch up to and including `stop`.

    `kind` decides its colour: a stage (enrichment, extraction, promotion) or a kind of site; grey otherwise. `strip`
    draws the stretch as a bar along the panel's top instead.
    """

    label: str
    start: float
    stop: float | None = None
    kind: str | None = None
    strip: bool = False

    @property
    def middle(self) -> float:
        return self.start if self.stop is None else (self.start + self.stop) / 2


class Label(NamedTuple):
    """Where a mark's label stands: its x, which part of it stands there, and its line, 0 next to the panel."""

    x: float
    anchor: str
    line: int


def lines_of(marks: Sequence[Mark], across: Across) -> int:
    """Lines of labels that these marks need above their panel."""
    return max((label.line + 1 for label in _labels(marks, across)), default=0)


def add_marks(figure: go.Figure, marks: Sequence[Mark], suffix: str, across: Across) -> None:
    """Draw them into the panel whose axes have this suffix."""
    for mark, label in zip(marks, _labels(marks, across), strict=True):
        _add_stretch(figure, mark, suffix)
        font = {"size": theme.SMALL_SIZE, "color": theme.mark_colour(mark.kind)}
        at = {"xref": f"x{suffix}", "yref": f"y{suffix} domain", "x": label.x, "xanchor": label.anchor, "y": 1}
        up = {"yanchor": "bottom", "yshift": LINE * label.line}
        figure.add_annotation(theme.note(escape(mark.label), **at, **up, font=font))


def _labels(marks: Sequence[Mark], across: Across) -> list[Label]:
    """Each mark's label over its middle, kept between the panel's edges and a line up where it would touch another."""
    found: list[Label] = []
    taken: list[list[tuple[float, float]]] = []
    for mark in marks:
        half, middle = _CHARACTER * len(unescape(escape(mark.label))) / 2, across.pixel(mark.middle)
        x, anchor, span = mark.middle, "center", (middle - half, middle + half)
        if middle < half:
            x, anchor, span = across.low, "left", (0.0, 2 * half)
        elif middle + half > across.pixels:
            x, anchor, span = across.high, "right", (across.pixels - 2 * half, across.pixels)
        free = (i for i, row in enumerate(taken) if all(_apart(span, other) for other in row))
        line = next(free, len(taken))
        taken += [[]] * (line == len(taken))
        taken[line] = [*taken[line], span]
        found.append(Label(x, anchor, line))
    return found


def _apart(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] - other[1] >= _BETWEEN or other[0] - one[1] >= _BETWEEN


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


_LEFT, _RIGHT, _LINE = 76, 24, 20
_INNER = theme.WIDTH - _LEFT - _RIGHT


@dataclass(frozen=True, eq=False)
class Series:
    """One line: means over x with their 95% intervals. `kind` decides how it looks: a kind of site (mlp, attn,
    hidden, ...) or of answer (original, target, control). On an axis of layers, x = -1 is the embedding."""

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
        where = f"{escape(x_word)} {self.x[place]:g}"
        if x_word == "layer" and self.x[place] == EMBEDDING:
            where = "embedding"
        lines = [f"<b>{escape(self.name)}</b>, {where}"]
        lines.append(f"mean <b>{number(float(self.mean[place]), 4)}</b>")
        if self.low is not None and self.high is not None:
            lines.append(interval_line(float(self.low[place]), float(self.high[place]), 4))
        if self.n is not None and np.isfinite(self.n[place]):  # type: ignore[index]
            lines.append(f"n = {int(self.n[place])}")  # type: ignore[index]
        return "<br>".join(lines)


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
    marks: Sequence[Mark] | Mapping[str, Sequence[Mark]] = (),
    columns: int | None = None,
    dashes: bool = False,
    levels: Mapping[str, float] | None = None,
    headings: Mapping[str, str] | None = None,
    scales: Mapping[str, str] | None = None,
    shared_rows: bool = False,
) -> go.Figure:
    """Panels over one x axis, at most `columns` a row; a name looks the same in each and has one legend entry.

    `dashes`: lines differ by dash even where markers tell them apart, and markers are open, so that lines on top of
    each other all show. `levels`: where a panel's thin line stands, if not at 0. `marks`: of every panel, or by panel.
    `headings` stand over panels. `scales`: a panel's y axis, "linear", "log" or "rank" (see scales.py); values stay
    true in hovers. `shared_rows`: the panels of a row have one y range.
    """
    of = marks if isinstance(marks, Mapping) else dict.fromkeys(panels, marks)
    groups = list(panels.values())
    everything = [s for group in groups for s in group]
    places = {float(v) for series in everything for v in series.x}
    wide = any(mark.stop is not None for some in of.values() for mark in some)
    across = Across.of(places, _INNER * Grid.of(len(panels), columns).share, wide)
    lines = [lines_of(of.get(panel, ()), across) for panel in panels]
    over = [LINE * n + 3 * bool(n) + _LINE * bool(headings) for n in lines]
    grid = Grid.of(len(panels), columns, max(over))
    names = list(dict.fromkeys(s.name for s in everything))
    figure = _empty(heading(title, subtitle), grid, max(over[: grid.columns]), legend_rows(names, _INNER))
    shown: set[str] = set()
    for place, (panel, group) in enumerate(panels.items()):
        suffix, scale = axis_suffix(place), (scales or {}).get(panel, "linear")
        first = place - place % grid.columns
        beside = groups[first : first + grid.columns] if shared_rows else [group]
        y = y_axis(_y_values(beside), scale, grid.panel, fixed=shared_rows)
        x = x_axis(places, x_title if place + grid.columns >= len(panels) else "", across, x_title == "layer")
        _add_axes(figure, grid, place, x, y, y_titles[place])
        _add_group(figure, group, names, suffix, _Style(x_title, dashes, scale, y, across.pixels), shown)
        if scale == "linear":
            _add_level(figure, suffix, (levels or {}).get(panel, 0))
        add_marks(figure, of.get(panel, ()), suffix, across)
        _add_heading(figure, (headings or {}).get(panel, ""), suffix, over[place] - _LINE)
    return figure


def _empty(head: Heading, grid: Grid, over: int, rows: int) -> go.Figure:
    """The frame and the legend of `rows` rows, with `over` pixels above the first row of panels."""
    above = 14 + over + _LINE * rows
    figure = go.Figure(layout=frame(head, above=above, plot=grid.height, below=58, left=_LEFT, right=_RIGHT))
    return figure.update_layout(legend=legend(grid.height, 6 + over) | {"tracegroupgap": 0}, hovermode="closest")


class _Style(NamedTuple):
    """What the lines of one panel share: the word for x, whether dashes tell them apart, the y axis, the width."""

    x_word: str
    dashes: bool
    scale: str
    axis: Mapping[str, Any]
    pixels: float

    def markers(self, series: Series) -> bool:
        """Whether each point is marked: lines of answers differ by dash, which close markers would hide."""
        room = self.pixels / len(series.x)
        return len(series.x) <= 40 and (room >= 14 or series.kind not in theme.ANSWERS)

    def ends(self, values: Sequence[float]) -> list[float | None]:
        """Ends of intervals as drawn: where one falls to 0 or below, a logarithmic axis shows its own end."""
        if self.scale != "log":
            return drawn(values, self.scale)
        return drawn(np.maximum(np.asarray(values, dtype=float), 10 ** self.axis["range"][0]), self.scale)


def _y_values(groups: Sequence[Sequence[Series]]) -> list[float]:
    """Every mean and end of an interval: what an axis has to have room for."""
    given = [values for group in groups for s in group for values in (s.mean, s.low, s.high) if values is not None]
    return [float(v) for values in given for v in values]


def limits(lines: Sequence[Series], low: float = 0.0, high: float = 1.0) -> tuple[float, float]:
    """From `low` to `high`, wider where a mean or its interval leaves them, with room for a marker on the edge."""
    drawn = [np.asarray(v) for line in lines for v in (line.mean, line.low, line.high) if v is not None]
    values = np.concatenate([[low, high], *drawn])
    values = values[np.isfinite(values)]
    pad = 0.04 * float(values.max() - values.min())
    return float(values.min()) - pad, float(values.max()) + pad


def _add_axes(figure: go.Figure, grid: Grid, place: int, x: dict[str, Any], y: dict[str, Any], y_title: str) -> None:
    suffix = axis_suffix(place)
    across, up = grid.domains(place)
    words = "<br>".join(wrap(y_title, grid.panel // 7, lines=2))
    figure.layout[f"xaxis{suffix}"] = {**x, "domain": across, "anchor": f"y{suffix}"}
    figure.layout[f"yaxis{suffix}"] = theme.axis(anchor=f"x{suffix}", domain=up, title=words, **y)


def _add_heading(figure: go.Figure, words: str, suffix: str, over: int) -> None:
    if words:
        at = {"xref": f"x{suffix} domain", "yref": f"y{suffix} domain", "x": 0, "xanchor": "left", "y": 1}
        figure.add_annotation(theme.note(f"<b>{escape(words)}</b>", **at, yanchor="bottom", yshift=over))


def _add_group(
    figure: go.Figure, group: Sequence[Series], names: Sequence[str], suffix: str, style: _Style, shown: set[str]
) -> None:
    """The lines of one panel; a name that is `shown` already stays out of the legend."""
    for series in group:
        look = theme.look(series.kind, names.index(series.name))
        _add_band(figure, series, look, suffix, style)
        _add_line(figure, series, look, suffix, style, series.name not in shown)
        shown.add(series.name)


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
        y=drawn(series.mean, style.scale),
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


def _lone_intervals(series: Series, colour: str, style: _Style) -> dict[str, Any] | None:
    """Error bars for points without a neighbour, whose band would have no width."""
    lone = {x[0]: (style.ends(low)[0], style.ends(high)[0]) for x, low, high in _stretches(series) if len(x) == 1}
    if not lone:
        return None
    means = drawn(series.mean, style.scale)
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


# Sequential editing: each metric, and how far the written weights have grown, after so many edits.
#
# Edits that pile up fail in two ways that belong side by side: the scores fall, and the weights' norms run away.

NORM_RATIO = "weight norm ratio"
"""The panel of ‖W_t‖ / ‖W_0‖: an axis around 1 in place of one from 0 to 1."""


def steps_figure(
    runs: Mapping[str, Mapping[str, Series]],
    *,
    title: str,
    subtitle: str = "",
    x_title: str = "edits so far",
    ratios: Collection[str] = (NORM_RATIO,),
    columns: int = 3,
) -> go.Figure:
    """{run: {panel: Series}} as one panel per metric, one line per run; the panels named in `ratios` come last.

    The run names its lines and gives them their colour, dash and marker: `name` and `kind` of the series do not count.
    """
    panels = _panels(runs, ratios)
    if not panels:
        raise ValueError("no run has a series to draw")
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
    for place, (name, lines) in enumerate(panels.items()):
        around = (0.95, 1.05) if name in ratios else (0.0, 1.0)
        figure.layout[f"yaxis{axis_suffix(place)}"].range = limits(lines, *around)
    if len({float(x) for lines in panels.values() for line in lines for x in line.x}) == 1:
        _stand_apart(figure, list(runs))
    return figure


def _panels(runs: Mapping[str, Mapping[str, Series]], ratios: Collection[str]) -> dict[str, list[Series]]:
    """{panel: lines}, in the order in which the runs name the panels, ratios last."""
    names = sorted(dict.fromkeys(name for by_panel in runs.values() for name in by_panel), key=lambda n: n in ratios)
    return {
        name: [replace(by_panel[name], name=run, kind=None) for run, by_panel in runs.items() if name in by_panel]
        for name in names
    }


def _stand_apart(figure: go.Figure, runs: Sequence[str]) -> None:
    """The runs side by side around their only step, where they would hide each other; hovers keep the step."""
    for place, run in enumerate(runs):
        shift = (place - (len(runs) - 1) / 2) * min(0.12, 0.8 / len(runs))
        for trace in figure.select_traces({"name": escape(run)}):
            trace.x = [x + shift for x in trace.x]
