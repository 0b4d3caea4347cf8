"""Heatmaps of causal effects: tokens (or roles, or heads) down, layers across, one panel per kind (001, Figure 1).

Zero is fixed at the bottom of every colour scale. Values below zero are drawn in blue-grey, darker as they fall, on
the same scale of magnitudes, and the figure says how far down they go. Cells not told apart from zero are hatched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from numpy import ndarray

from . import theme
from .colour_bar import DROP, colour_bar, room_below
from .grid import axis_suffix
from .hatch import hatch, hatch_note
from .layout import frame, heading, layer_ticks
from .panel import Panel
from .text import escape, readable_token

_GAP = 0.035  # between panels of a row, as a part of the plot's width
_NOTE = 20  # pixels of a line of the note below everything
_NOTE_LETTER = 6.4  # and of a letter in it


class _Place(NamedTuple):
    """Where a panel stands: its number, its column, its stretches of the plot (0 to 1), and pixels."""

    number: int
    column: int
    across: tuple[float, float]
    up: tuple[float, float]
    pixels: float
    row_height: float
    plot: int

    @property
    def suffix(self) -> str:
        return axis_suffix(self.number)


def heatmap(
    values: Float[ndarray, "row layer"],
    rows: Sequence[str],
    *,
    title: str,
    subtitle: str = "",
    kind: str = "mlp",
    **panel: Any,
) -> go.Figure:
    """One kind's effects. `panel` takes the fields of `Panel`: low, high, n, p, q, subject_rows, zmax, ..."""
    only = Panel(values, rows, kind=kind, **{"title": "", **panel})
    return heatmap_panel([only], title=title, subtitle=subtitle)


def heatmap_panel(
    panels: Sequence[Panel | Mapping[str, Any]],
    *,
    title: str = "",
    subtitle: str = "",
    shared_scale: bool = True,
    columns: int = 3,
) -> go.Figure:
    """Figure 1's layout: panels over the same rows, at most `columns` side by side, by default on one scale."""
    grids = [p if isinstance(p, Panel) else Panel(**p) for p in panels]
    if not grids or any(list(g.rows) != list(grids[0].rows) for g in grids):
        raise ValueError("heatmap_panel needs one panel or more, all with the same rows")
    top = max(g.top for g in grids)
    labels = [readable_token(row) for row in grids[0].rows]
    left = 34 + round(7.6 * min(28, max(len(label) for label in labels)))
    above, below = 30 if any(g.heading for g in grids) else 6, max(room_below(g) for g in grids)
    places = _places(len(grids), len(labels), columns, above + below, theme.WIDTH - left - 24)
    note = wrap(hatch_note(grids), max(40, int((theme.WIDTH - left - 24) / _NOTE_LETTER)))
    under = below + _NOTE * len(note)
    layout = frame(heading(title, subtitle), above=above, plot=places[0].plot, below=under, left=left)
    gaps = any(g.gaps for g in grids)
    figure = go.Figure(layout={**layout, "plot_bgcolor": theme.UNTRACED if gaps else theme.RULE})
    for grid, place in zip(grids, places, strict=True):
        _add_panel(figure, grid, place, top if shared_scale else grid.top)
        _add_rows(figure, grid, place, labels)
    if note:
        quiet = {"size": theme.SMALL_SIZE, "color": theme.MUTED}
        low = {"y": 0, "yanchor": "bottom", "yshift": 8 - under}
        figure.add_annotation(
            theme.note("<br>".join(map(escape, note)), x=0, align="left", xanchor="left", font=quiet, **low)
        )
    return figure


def _row_height(rows: int) -> int:
    return 28 if rows <= 12 else 22 if rows <= 30 else 16


def _places(count: int, labels: int, columns: int, between: int, width: float) -> list[_Place]:
    """The fewest rows of at most `columns` panels, evenly filled; `between` pixels from one row to the next."""
    lines = -(-count // columns)
    wide = -(-count // lines)
    height = _row_height(labels)
    plot = lines * height * labels + (lines - 1) * between
    share = (1 - _GAP * (wide - 1)) / wide
    found = []
    for index in range(count):
        line, column = divmod(index, wide)
        start = column * (share + _GAP)
        roof = 1 - line * (height * labels + between) / plot
        up = (max(0.0, roof - height * labels / plot), roof)
        found.append(_Place(number, column, (start, min(1.0, start + share)), up, width * share, height, plot))
    return found


def _add_panel(figure: go.Figure, grid: Panel, place: _Place, top: float) -> None:
    assert grid.layers is not None
    look, suffix, layers = theme.look(grid.kind), place.suffix, len(grid.layers)
    gap = 1 if place.pixels / layers >= 9 else 0
    axes = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
    cells = {**axes, "xgap": gap, "ygap": gap}
    bar = place.up[0] - DROP / place.plot
    figure.add_heatmap(
        z=_cells(grid.values),
        zmin=0,
        zmax=top,
        colorscale=theme.colorscale(look.scale),
        colorbar=colour_bar(grid, place.across, bar, top, place.pixels),
        hovertext=grid.hovers(),
        hoverinfo="text",
        name=escape(look.label),
        **cells,
    )
    if grid.lowest < 0:
        _add_below_zero(figure, grid, top, cells)
    if grid.hatched.any():
        _add_hatch(figure, grid, place, axes)
    ticks = layer_ticks(grid.layers, place.pixels)
    figure.layout[f"xaxis{suffix}"] = theme.axis(
        domain=place.across,
        anchor=f"y{suffix}",
        showgrid=False,
        showline=False,
        range=[-0.5, layers - 0.5],
        title="layer",
        **ticks,
    )
    if grid.heading:
        at = {"x": place.across[0], "xanchor": "left", "y": place.up[1], "yanchor": "bottom", "yshift": 5}
        figure.add_annotation(theme.note(f"<b>{escape(grid.heading)}</b>", **at))


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


def _add_hatch(figure: go.Figure, grid: Panel, place: _Place, axes: dict[str, str]) -> None:
    lines = hatch(grid.hatched, place.pixels / grid.values.shape[1], place.row_height)
    figure.add_scatter(
        x=lines.x,
        y=lines.y,
        mode="lines",
        line={"color": theme.transparent(theme.MUTED, 0.5), "width": 1},
        hoverinfo="skip",
        showlegend=False,
        name="not told apart from zero",
        **axes,
    )


def _cells(values: Float[ndarray, "row layer"]) -> list[list[float | None]]:
    """As lists, so that a figure's JSON can be read; a cell without a value is null."""
    return [[float(v) if np.isfinite(v) else None for v in row] for row in values]


def _add_rows(figure: go.Figure, grid: Panel, place: _Place, labels: Sequence[str]) -> None:
    """Numeric rows with tick texts (a repeated token keeps its own row); subject rows bold, starred and barred."""
    suffix, first = place.suffix, place.column == 0
    subject = set(grid.subject_rows)
    texts = [f"<b>{escape(t)}*</b>" if i in subject else escape(t) for i, t in enumerate(labels)]
    figure.layout[f"yaxis{suffix}"] = theme.axis(
        anchor=f"x{suffix}",
        domain=place.up,
        range=[len(labels) - 0.5, -0.5],
        showgrid=False,
        showline=False,
        showticklabels=first,
        ticks="",
        ticklabelstandoff=10,
        tickmode="array",
        tickvals=list(range(len(labels))),
        ticktext=texts,
        **({} if place.number == 0 else {"matches": "y"}),
    )
    if subject and first:
        quiet = {"size": theme.SMALL_SIZE, "color": theme.MUTED}
        corner = {"x": 0, "xanchor": "right", "xshift": -14, "y": place.up[0], "yanchor": "top", "yshift": -6}
        figure.add_annotation(theme.note("* subject", font=quiet, **corner))
    for start, stop in _runs(sorted(subject)):
        figure.add_shape(
            type="rect",
            xref="paper",
            yref=f"y{suffix}",
            xsizemode="pixel",
            xanchor=place.across[0],
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
