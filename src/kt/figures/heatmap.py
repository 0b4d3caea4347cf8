"""Heatmaps of causal effects: tokens (or roles) down, layers across, one panel per kind (001, Figure 1).

Zero is fixed at the bottom of every colour scale. Values below zero are drawn in blue-grey, darker as they fall, on
the same scale of magnitudes, and the figure says how far down they go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from numpy import ndarray

from . import theme
from .layout import frame, heading, layer_ticks
from .text import escape, interval_line, number, readable_token

_COLOUR_BAR = 96  # pixels below the plot: layer ticks, axis title, then the bar with its own title


@dataclass(frozen=True, eq=False)
class Panel:
    """One kind's grid of effects, with what its hovers say."""

    values: Float[ndarray, "row layer"]
    rows: Sequence[str]
    kind: str = "mlp"
    low: Float[ndarray, "row layer"] | None = None
    high: Float[ndarray, "row layer"] | None = None
    n: ndarray | int | None = None
    subject_rows: Sequence[int] = ()
    layers: Sequence[int] | None = None
    title: str | None = None
    colour_title: str = "effect"
    zmax: float | None = None
    row_word: str = "token"

    def __post_init__(self) -> None:
        values = np.asarray(self.values, dtype=float)
        object.__setattr__(self, "values", values)
        if values.ndim != 2 or values.shape[0] != len(self.rows) or 0 in values.shape:
            raise ValueError(f"values {values.shape} must be (row, layer) with one of the {len(self.rows)} rows each")
        if self.layers is None:
            object.__setattr__(self, "layers", tuple(range(values.shape[1])))
        elif len(self.layers) != values.shape[1]:
            raise ValueError(f"values {values.shape} must have one column for each of {len(self.layers)} layers")

    def grid(self, what: ndarray | float | None) -> Float[ndarray, "row layer"]:
        """Any of `low`, `high`, `n` cell by cell; a vector holds one number per row."""
        cells = np.asarray(np.nan if what is None else what, dtype=float)
        return np.broadcast_to(cells[:, None] if cells.ndim == 1 else cells, self.values.shape)

    @property
    def top(self) -> float:
        """The upper end of the colour scale."""
        if self.zmax is not None:
            return self.zmax
        finite = self.values[np.isfinite(self.values)]
        top = max(finite.max(initial=0.0), 0.0) or np.abs(finite).max(initial=0.0)
        return float(top) or 1.0


def heatmap(
    values: Float[ndarray, "row layer"],
    rows: Sequence[str],
    *,
    title: str,
    subtitle: str = "",
    kind: str = "mlp",
    **panel: Any,
) -> go.Figure:
    """One kind's effects. `panel` takes the fields of `Panel`: low, high, n, subject_rows, zmax, ..."""
    only = Panel(values, rows, kind=kind, **{"title": "", **panel})
    return heatmap_panel([only], title=title, subtitle=subtitle)


def heatmap_panel(
    panels: Sequence[Panel | Mapping[str, Any]],
    *,
    title: str = "",
    subtitle: str = "",
    shared_scale: bool = True,
) -> go.Figure:
    """Figure 1's layout: panels side by side over the same rows, by default on one scale."""
    grids = [p if isinstance(p, Panel) else Panel(**p) for p in panels]
    if not grids or any(list(g.rows) != list(grids[0].rows) for g in grids):
        raise ValueError("heatmap_panel needs one panel or more, all with the same rows")
    top = max(g.top for g in grids)
    labels = [readable_token(row) for row in grids[0].rows]
    head = heading(title, subtitle)
    plot = _row_height(len(labels)) * len(labels)
    left = 34 + round(7.6 * min(28, max(len(label) for label in labels)))
    above = 30 if any(_panel_title(g) for g in grids) else 6
    gaps = not all(np.isfinite(g.values).all() for g in grids)
    layout = frame(head, above=above, plot=plot, below=_below(grids), left=left)
    figure = go.Figure(layout={**layout, "plot_bgcolor": theme.UNTRACED if gaps else theme.RULE})
    for place, (grid, span) in enumerate(zip(grids, _spans(len(grids)), strict=True)):
        pixels = (theme.WIDTH - left - 24) * (span[1] - span[0])
        _add_panel(figure, grid, place, span, top if shared_scale else grid.top, plot, pixels)
        _add_rows(figure, grid, place, span, labels)
    return figure


def _row_height(rows: int) -> int:
    return 28 if rows <= 12 else 22 if rows <= 30 else 16


def _spans(count: int) -> list[tuple[float, float]]:
    gap = 0.035
    width = (1 - gap * (count - 1)) / count
    return [(i * (width + gap), i * (width + gap) + width) for i in range(count)]


def _panel_title(grid: Panel) -> str:
    return theme.look(grid.kind).label if grid.title is None else grid.title


def _below(grids: Sequence[Panel]) -> int:
    lines = [1 + (_lowest(g) < 0) + (not np.isfinite(g.values).all()) for g in grids]
    return _COLOUR_BAR + 6 + 16 * max(lines)


def _lowest(grid: Panel) -> float:
    return float(grid.values[np.isfinite(grid.values)].min(initial=0.0))


def _add_panel(
    figure: go.Figure, grid: Panel, place: int, span: tuple[float, float], top: float, plot: int, pixels: float
) -> None:
    assert grid.layers is not None
    suffix = "" if place == 0 else str(place + 1)
    look = theme.look(grid.kind)
    gap = 1 if pixels / len(grid.layers) >= 9 else 0
    cells = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}", "xgap": gap, "ygap": gap}
    figure.add_heatmap(
        z=_cells(grid.values),
        zmin=0,
        zmax=top,
        colorscale=theme.colorscale(look.scale),
        colorbar=_colour_bar(grid, span, top, plot, pixels),
        hovertext=_hovers(grid),
        hoverinfo="text",
        name=escape(look.label),
        **cells,
    )
    if _lowest(grid) < 0:
        _add_below_zero(figure, grid, top, cells)
    ticks = layer_ticks(grid.layers, pixels)
    limits = [-0.5, len(grid.layers) - 0.5]
    figure.layout[f"xaxis{suffix}"] = theme.axis(
        domain=span, anchor=f"y{suffix}", showgrid=False, showline=False, range=limits, title="layer", **ticks
    )
    if words := _panel_title(grid):
        at = {"x": span[0], "xanchor": "left", "y": 1, "yanchor": "bottom", "yshift": 5}
        figure.add_annotation(theme.note(f"<b>{escape(words)}</b>", **at))


def _add_below_zero(figure: go.Figure, grid: Panel, top: float, cells: dict[str, Any]) -> None:
    """Cells below zero, over the ones that the sequential scale draws like zero; hovers stay those below."""
    figure.add_heatmap(
        z=_cells(np.where(grid.values < 0, grid.values, np.nan)),
        zmin=-top,
        zmax=0,
        colorscale=theme.colorscale(theme.BELOW_ZERO[::-1]),
        showscale=False,
        hoverinfo="skip",
        name="below zero",
        **cells,
    )


def _cells(values: Float[ndarray, "row layer"]) -> list[list[float | None]]:
    """As lists, so that a figure's JSON can be read; a cell without a value is null."""
    return [[float(v) if np.isfinite(v) else None for v in row] for row in values]


def _colour_bar(grid: Panel, span: tuple[float, float], top: float, plot: int, pixels: float) -> dict[str, Any]:
    words = escape(grid.colour_title)
    if (lowest := _lowest(grid)) < 0:
        shades = "".join(f'<span style="color:{colour}">■</span>' for colour in theme.BELOW_ZERO)
        words += f"<br>{shades} below zero, down to {number(lowest)}"
    if not np.isfinite(grid.values).all():
        words += f'<br><span style="color:{theme.UNTRACED}">■</span> no value'
    return {
        "orientation": "h",
        "thickness": 10,
        "lenmode": "fraction",
        "len": (span[1] - span[0]) * min(360.0, pixels - 26) / pixels,
        "x": span[0],
        "xanchor": "left",
        "xpad": 0,
        "ypad": 0,
        "y": -52 / plot,
        "yanchor": "top",
        "outlinewidth": 0.5,
        "outlinecolor": theme.MUTED,
        **colour_ticks(top),
        "tickfont": {"size": theme.SMALL_SIZE, "color": theme.INK},
        "title": {"text": words, "side": "bottom", "font": {"size": theme.SMALL_SIZE, "color": theme.MUTED}},
    }


def colour_ticks(top: float) -> dict[str, Any]:
    """Round numbers from zero, and the very top of the scale."""
    power = 10 ** np.floor(np.log10(top))
    step = next(s * power for s in (0.1, 0.2, 0.25, 0.5, 1, 2, 2.5, 5) if top / (s * power) <= 4)
    values = [float(v) for v in np.arange(0, top, step) if v <= 0.87 * top] + [top]
    return {"tickmode": "array", "tickvals": values, "ticktext": [f"{v:.3g}" for v in values]}


def _add_rows(figure: go.Figure, grid: Panel, place: int, span: tuple[float, float], labels: Sequence[str]) -> None:
    """Numeric rows with tick texts (a repeated token keeps its own row); subject rows bold, starred and barred."""
    suffix = "" if place == 0 else str(place + 1)
    subject = set(grid.subject_rows)
    texts = [f"<b>{escape(t)}*</b>" if i in subject else escape(t) for i, t in enumerate(labels)]
    figure.layout[f"yaxis{suffix}"] = theme.axis(
        anchor=f"x{suffix}",
        range=[len(labels) - 0.5, -0.5],
        showgrid=False,
        showline=False,
        showticklabels=place == 0,
        ticks="",
        ticklabelstandoff=10,
        tickmode="array",
        tickvals=list(range(len(labels))),
        ticktext=texts,
        **({} if place == 0 else {"matches": "y"}),
    )
    if subject and place == 0:
        quiet = {"size": theme.SMALL_SIZE, "color": theme.MUTED}
        corner = {"x": 0, "xanchor": "right", "xshift": -14, "y": 0, "yanchor": "top", "yshift": -6}
        figure.add_annotation(theme.note("* subject", font=quiet, **corner))
    for start, stop in _runs(sorted(subject)):
        figure.add_shape(
            type="rect",
            xref="paper",
            yref=f"y{suffix}",
            xsizemode="pixel",
            xanchor=span[0],
            x0=-7,
            x1=-3,
            y0=start - 0.5,
            y1=stop + 0.5,
            line={"width": 0},
            fillcolor=theme.INK,
        )


def _runs(places: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring integers as (first, last)."""
    runs: list[tuple[int, int]] = []
    for place in places:
        if runs and place == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], place)
        else:
            runs.append((place, place))
    return runs


def _hovers(grid: Panel) -> list[list[str]]:
    assert grid.layers is not None
    low, high, n, layers = grid.grid(grid.low), grid.grid(grid.high), grid.grid(grid.n), grid.layers
    look, subject = escape(theme.look(grid.kind).label), set(grid.subject_rows)
    word = escape(grid.row_word)

    def cell(row: int, column: int) -> str:
        head = f"<b>{escape(readable_token(grid.rows[row], 60))}</b>  ({word} {row}{', subject' * (row in subject)})"
        lines = [head, f"{look}, layer {layers[column]}"]
        value = grid.values[row, column]
        if not np.isfinite(value):
            return "<br>".join([*lines, "no value"])
        lines.append(f"{escape(grid.colour_title)}: <b>{number(value, 4)}</b>")
        if grid.low is not None and grid.high is not None:
            lines.append(interval_line(low[row, column], high[row, column], 4))
        if np.isfinite(n[row, column]):
            lines.append(f"n = {int(n[row, column])}")
        return "<br>".join(lines)

    return [[cell(r, c) for c in range(grid.values.shape[1])] for r in range(grid.values.shape[0])]
