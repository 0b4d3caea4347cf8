"""Heatmaps of causal effects: tokens (roles, heads) down, layers across, a panel a kind (IntAttn-Edit, Figure 1).

Zero is fixed at the bottom of every colour scale. Values below zero are drawn in blue-grey, darker as they fall, on
the same scale of magnitudes, and the figure states the lowest value. Cells that do not differ significantly from zero
are hatched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool, Float
from numpy import ndarray

from ..stats import smallest_p
from . import theme
from .layout import axis_suffix, frame, heading, layer_ticks
from .text import escape, interval_line, number, readable_token

_STEP = 8.0  # pixels between two hatching lines, along a row
_DROP = 52  # pixels from the plot to the colour bar, for layer ticks and the axis title
_BAR = 96  # pixels below the plot: _DROP, then the bar with its ticks and the first line of its title
_GAP = 0.035  # gap between panels of a row, as a fraction of the plot's width
_NOTE, _NOTE_LETTER = 20, 6.4  # pixels of a line and of a letter of the note at the bottom


def heatmap(
    values: Float[ndarray, "row layer"],
    rows: Sequence[str],
    *,
    title: str,
    subtitle: str = "",
    kind: str = "mlp",
    **panel: Any,
) -> go.Figure:
    """A heatmap of one kind's effects. `panel` takes the fields of `Panel`: low, high, n, p, q, subject_rows, ..."""
    grid = Panel(values, rows, kind=kind, **{"title": "", **panel})
    return heatmap_panel([grid], title=title, subtitle=subtitle)


def heatmap_panel(
    panels: Sequence[Panel | Mapping[str, Any]],
    *,
    title: str = "",
    subtitle: str = "",
    shared_scale: bool = True,
    columns: int = 3,
) -> go.Figure:
    """Figure 1's layout: panels with the same rows, at most `columns` side by side.

    Args:
        panels: `Panel`s, or mappings of their fields.
        shared_scale: use one colour scale for all panels.

    Raises:
        ValueError: no panel, or panels with different rows.
    """
    grids = [p if isinstance(p, Panel) else Panel(**p) for p in panels]
    if not grids or any(list(g.rows) != list(grids[0].rows) for g in grids):
        raise ValueError("heatmap_panel needs one panel or more, all with the same rows")
    top = max(g.top for g in grids)
    labels = [readable_token(row) for row in grids[0].rows]
    left = 34 + round(7.6 * min(28, max(len(label) for label in labels)))
    above, below = 30 if any(g.heading for g in grids) else 6, max(room_below(g) for g in grids)
    slots = _slots(len(grids), len(labels), columns, above + below, theme.WIDTH - left - 24)
    note = wrap(hatch_note(grids), max(40, int((theme.WIDTH - left - 24) / _NOTE_LETTER)))
    under = below + _NOTE * len(note)
    layout = frame(heading(title, subtitle), above=above, plot=slots[0].plot, below=under, left=left)
    gaps = any(g.gaps for g in grids)
    figure = go.Figure(layout={**layout, "plot_bgcolor": theme.UNTRACED if gaps else theme.RULE})
    for grid, slot in zip(grids, slots, strict=True):
        _add_panel(figure, grid, slot, top if shared_scale else grid.top)
        _add_rows(figure, grid, slot, labels)
    if note:
        bottom = {"y": 0, "yanchor": "bottom", "yshift": 8 - under}
        text = "<br>".join(map(escape, note))
        figure.add_annotation(theme.note(text, x=0, align="left", xanchor="left", font=theme.QUIET, **bottom))
    return figure


def heads_figure(
    values: Float[ndarray, "layer head"],
    low: Float[ndarray, "layer head"] | None = None,
    high: Float[ndarray, "layer head"] | None = None,
    q: Float[ndarray, "layer head"] | None = None,
    *,
    title: str,
    subtitle: str = "",
    p: Float[ndarray, "layer head"] | None = None,
    n: Float[ndarray, "layer head"] | int | None = None,
    heads: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    rows: Sequence[str] | None = None,
    kind: str = "attn",
    **panel: Any,
) -> go.Figure:
    """The effect of every head (or expert) of every layer, in the look of the other heatmaps.

    Args:
        values, low, high, p, q, n: one number per layer and head; NaN means not measured.
        heads, layers: the numbers of heads and layers; by default 0, 1, ...
        rows: names of the parts, where they are no heads.
        kind: the kind whose colours they take.
        panel: further fields of `Panel`: colour_title, zmax, alpha, over.

    Raises:
        ValueError: shapes that do not match.
    """
    cells = {"low": low, "high": high, "q": q, "p": p, "n": n}
    by_head = {k: v if v is None or np.ndim(v) == 0 else np.asarray(v, dtype=float).T for k, v in cells.items()}
    values = np.asarray(values, dtype=float).T
    rows = rows or [f"head {h}" for h in (range(len(values)) if heads is None else heads)]
    grid = Panel(values, rows, kind=kind, title="", row_word="", layers=layers, **{**by_head, **panel})  # type: ignore[arg-type]
    return heatmap_panel([grid], title=title, subtitle=subtitle)


@dataclass(frozen=True, eq=False)
class Panel:
    """One kind's grid of effects.

    Cells without a finite value are drawn as "no value". `p` and `q` are of the test that a cell's mean is 0; cells
    with `q` of `alpha` or more are hatched. `over` names the records that n counts.
    """

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
    p: Float[ndarray, "row layer"] | None = None
    q: Float[ndarray, "row layer"] | None = None
    alpha: float = 0.05
    over: str = "facts"
    marked: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Layers to mark above the cells, by what they are (`linear attention`)."""

    def __post_init__(self) -> None:
        values = np.asarray(self.values, dtype=float)
        object.__setattr__(self, "values", values)
        if values.ndim != 2 or values.shape[0] != len(self.rows) or 0 in values.shape:
            raise ValueError(f"values {values.shape} must be (row, layer) with one of the {len(self.rows)} rows each")
        if self.layers is None:
            object.__setattr__(self, "layers", tuple(range(values.shape[1])))
        elif len(self.layers) != values.shape[1]:
            raise ValueError(f"values {values.shape} must have one column for each of {len(self.layers)} layers")

    def grid(self, values: ndarray | float | None) -> Float[ndarray, "row layer"]:
        """Broadcast any of `low`, `high`, `n`, `p`, `q` to all cells; a vector holds one number per row."""
        cells = np.asarray(np.nan if values is None else values, dtype=float)
        return np.broadcast_to(cells[:, None] if cells.ndim == 1 else cells, self.values.shape)

    @property
    def top(self) -> float:
        """The upper end of the colour scale."""
        if self.zmax is not None:
            return self.zmax
        finite = self.values[np.isfinite(self.values)]
        top = max(finite.max(initial=0.0), 0.0) or np.abs(finite).max(initial=0.0)
        return float(top) or 1.0

    @property
    def lowest(self) -> float:
        """The lowest value below zero, or zero."""
        return float(self.values[np.isfinite(self.values)].min(initial=0.0))

    @property
    def gaps(self) -> bool:
        """Whether a cell has no value."""
        return not bool(np.isfinite(self.values).all())

    @property
    def heading(self) -> str:
        """The panel's title, by default its kind's label."""
        return theme.look(self.kind).label if self.title is None else self.title

    @property
    def tested(self) -> Bool[ndarray, "row layer"]:
        """Cells with a value and a q."""
        return np.isfinite(self.values) & np.isfinite(self.grid(self.q))

    @property
    def testable(self) -> bool:
        """Whether any cell could get a p below `alpha`: the test's least p depends on n (see stats.py)."""
        too_few = smallest_p(self.grid(self.n)) >= self.alpha  # an unknown n counts as large enough
        return bool((self.tested & ~too_few).any())

    @property
    def hatched(self) -> Bool[ndarray, "row layer"]:
        """Cells not told apart from zero; none if n is too small for any cell, since the test then says nothing."""
        return self.tested & (self.grid(self.q) >= self.alpha) & self.testable

    def hovers(self) -> list[list[str]]:
        """The hover text of every cell."""
        return [[self._hover(r, c) for c in range(self.values.shape[1])] for r in range(self.values.shape[0])]

    def _hover(self, row: int, column: int) -> str:
        assert self.layers is not None
        subject = ", subject" * (row in set(self.subject_rows))
        position = f"  ({escape(self.row_word)} {row}{subject})" if self.row_word else ""
        lines = [f"<b>{escape(readable_token(self.rows[row], 60))}</b>{position}"]
        of = [word for word, layers in self.marked.items() if self.layers[column] in layers]
        kind = f" ({escape(of[0])})" if of else ""
        lines.append(f"{escape(theme.look(self.kind).label)}, layer {self.layers[column]}{kind}")
        cell = {name: self.grid(getattr(self, name))[row, column] for name in ("values", "low", "high", "n", "p", "q")}
        if not np.isfinite(cell["values"]):
            return "<br>".join([*lines, "no value"])
        lines.append(f"{escape(self.colour_title)}: <b>{number(cell['values'], 4)}</b>")
        if self.low is not None and self.high is not None:
            lines.append(interval_line(cell["low"], cell["high"], 4))
        if np.isfinite(cell["n"]):
            lines.append(f"n = {int(cell['n'])}")
        tests = [f"{name} = {number(cell[name])}" for name in ("p", "q") if np.isfinite(cell[name])]
        return "<br>".join([*lines, *([", ".join(tests)] if tests else [])])


class _Slot(NamedTuple):
    """A panel's position: index, column, domains of its axes (0 to 1), and sizes in pixels."""

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


def _slots(count: int, labels: int, columns: int, between: int, width: float) -> list[_Slot]:
    """The fewest rows of at most `columns` panels, evenly filled, with `between` pixels between rows."""
    lines = -(-count // columns)
    wide = -(-count // lines)
    height = 28 if labels <= 12 else 22 if labels <= 30 else 16
    plot = lines * height * labels + (lines - 1) * between
    share = (1 - _GAP * (wide - 1)) / wide
    slots = []
    for index in range(count):
        line, column = divmod(index, wide)
        start = column * (share + _GAP)
        roof = 1 - line * (height * labels + between) / plot
        up = (max(0.0, roof - height * labels / plot), roof)
        slots.append(_Slot(index, column, (start, min(1.0, start + share)), up, width * share, height, plot))
    return slots


def _add_panel(figure: go.Figure, grid: Panel, slot: _Slot, top: float) -> None:
    assert grid.layers is not None
    look, suffix, layers = theme.look(grid.kind), slot.suffix, len(grid.layers)
    gap = 1 if slot.pixels / layers >= 9 else 0
    axes = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
    cells = {**axes, "xgap": gap, "ygap": gap}
    bar = slot.up[0] - _DROP / slot.plot
    figure.add_heatmap(
        z=_cells(grid.values),
        zmin=0,
        zmax=top,
        colorscale=theme.colorscale(look.scale),
        colorbar=colour_bar(grid, slot.across, bar, top, slot.pixels),
        hovertext=grid.hovers(),
        hoverinfo="text",
        name=escape(look.label),
        **cells,
    )
    if grid.lowest < 0:
        _add_below_zero(figure, grid, top, cells)
    if grid.hatched.any():
        _add_hatch(figure, grid, slot, axes)
    ticks = layer_ticks(grid.layers, slot.pixels)
    figure.layout[f"xaxis{suffix}"] = theme.axis(
        domain=slot.across,
        anchor=f"y{suffix}",
        showgrid=False,
        showline=False,
        range=[-0.5, layers - 0.5],
        title="layer",
        **ticks,
    )
    legend = _add_marks(figure, grid, slot)
    if grid.heading or legend:
        at = {"x": slot.across[0], "xanchor": "left", "y": slot.up[1], "yanchor": "bottom", "yshift": 5}
        words = [f"<b>{escape(grid.heading)}</b>"] * bool(grid.heading) + legend
        figure.add_annotation(theme.note("  ".join(words), **at))


def _add_marks(figure: go.Figure, grid: Panel, slot: _Slot) -> list[str]:
    """A line above the columns of marked layers, one colour for each sort; the words of the legend."""
    assert grid.layers is not None
    legend, height = [], slot.up[1] + 3 / slot.plot
    for (word, layers), colour in zip(grid.marked.items(), theme.SERIES[2:], strict=False):
        columns = np.array([layer in layers for layer in grid.layers])
        for start, stop in _runs(columns):
            across = {"x0": start - 0.42, "x1": stop + 0.42, "y0": height, "y1": height}
            line = {"color": colour, "width": 3}
            figure.add_shape(type="line", xref=f"x{slot.suffix}", yref="paper", line=line, **across)
        if columns.any():
            legend.append(f'<span style="color:{colour}">▬ {escape(word)}</span>')
    return legend


def _add_below_zero(figure: go.Figure, grid: Panel, top: float, cells: dict[str, Any]) -> None:
    """Draw cells below zero over the main heatmap, which shows them as zero; hovers come from the main heatmap."""
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


def _add_hatch(figure: go.Figure, grid: Panel, slot: _Slot, axes: dict[str, str]) -> None:
    lines = hatch(grid.hatched, slot.pixels / grid.values.shape[1], slot.row_height)
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
    """Lists, which keep a figure's JSON readable; a cell without a value is None."""
    return [[float(v) if np.isfinite(v) else None for v in row] for row in values]


def _add_rows(figure: go.Figure, grid: Panel, slot: _Slot, labels: Sequence[str]) -> None:
    """Label the rows (by number, since tokens may repeat); mark subject rows by bold text, star and bar."""
    suffix, first = slot.suffix, slot.column == 0
    subject = set(grid.subject_rows)
    texts = [f"<b>{escape(t)}*</b>" if i in subject else escape(t) for i, t in enumerate(labels)]
    figure.layout[f"yaxis{suffix}"] = theme.axis(
        anchor=f"x{suffix}",
        domain=slot.up,
        range=[len(labels) - 0.5, -0.5],
        showgrid=False,
        showline=False,
        showticklabels=first,
        ticks="",
        ticklabelstandoff=10,
        tickmode="array",
        tickvals=list(range(len(labels))),
        ticktext=texts,
        **({} if slot.number == 0 else {"matches": "y"}),
    )
    if subject and first:
        corner = {"x": 0, "xanchor": "right", "xshift": -14, "y": slot.up[0], "yanchor": "top", "yshift": -6}
        figure.add_annotation(theme.note("* subject", font=theme.QUIET, **corner))
    for start, stop in _runs(np.isin(np.arange(len(labels)), list(subject))):
        figure.add_shape(
            type="rect",
            xref="paper",
            yref=f"y{suffix}",
            xsizemode="pixel",
            xanchor=slot.across[0],
            x0=-7,
            x1=-3,
            y0=start - 0.5,
            y1=stop + 0.5,
            line={"width": 0},
            fillcolor=theme.INK,
        )


def _runs(marked: Bool[ndarray, " index"]) -> list[tuple[int, int]]:
    """Runs of marked neighbours as (first, last)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marked, [False]]).astype(np.int8)))
    return [(int(first), int(stop) - 1) for first, stop in edges.reshape(-1, 2)]


class Lines(NamedTuple):
    """Ends of line segments in units of cells (layer across, row down), with None between two segments."""

    x: list[float | None]
    y: list[float | None]


def hatch(cells: Bool[ndarray, "row layer"], width: float, height: float) -> Lines:
    """Lines at 45 degrees through the marked cells, for cells of `width` by `height` pixels.

    All lines are on one raster, and neighbours in a row count as one rectangle, so lines continue from cell to cell.
    """
    x: list[float | None] = []
    y: list[float | None] = []
    for row, first, last in ((row, *run) for row, marked in enumerate(cells) for run in _runs(marked)):
        left, right, top, bottom = first * width, (last + 1) * width, row * height, (row + 1) * height
        for c in np.arange(np.ceil((left + top) / _STEP) * _STEP, right + bottom, _STEP):
            ends = max(left, c - bottom), min(right, c - top)
            if ends[1] - ends[0] > 1e-9:
                x += [*(end / width - 0.5 for end in ends), None]
                y += [*((c - end) / height - 0.5 for end in ends), None]
    return Lines(x[:-1], y[:-1])


def hatch_note(panels: Sequence[Panel]) -> str:
    """The meaning of hatching, or the reason why there is none; "" if nothing was tested or all cells differ."""
    panel = next((panel for panel in panels if panel.hatched.any()), None)
    if panel is not None:
        rate = f"{100 * panel.alpha:g}%"
        note = f"hatched: not told apart from zero (sign-flip test over {panel.over}, false discovery rate {rate}"
        # With so small an n a single cell cannot be significant, however large its effect: too few sign flips exist.
        least = float(np.nanmin(smallest_p(panel.grid(panel.n)), initial=np.inf))
        few = np.isfinite(least) and least * panel.tested.sum() > panel.alpha
        return note + (f"; so few {panel.over} give no p below {least:.2g})" if few else ")")
    if any(panel.tested.any() for panel in panels) and not any(panel.testable for panel in panels):
        return f"no cell can be told apart from zero with so few {panels[0].over} (sign-flip test)"
    return ""


def room_below(panel: Panel) -> int:
    """Pixels that a panel needs below its plot."""
    return _BAR + 6 + 16 * (1 + (panel.lowest < 0) + panel.gaps)


def colour_bar(panel: Panel, span: tuple[float, float], bottom: float, top: float, pixels: float) -> dict[str, Any]:
    """Plotly's fields of a colour bar with its upper edge at `bottom` (paper coordinates) and a scale up to `top`."""
    words = escape(panel.colour_title)
    if panel.lowest < 0:
        shades = "".join(f'<span style="color:{colour}">■</span>' for colour in theme.BELOW_ZERO)
        words += f"<br>{shades} below zero, down to {number(panel.lowest)}"
    if panel.gaps:
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
        "y": bottom,
        "yanchor": "top",
        "outlinewidth": 0.5,
        "outlinecolor": theme.MUTED,
        **colour_ticks(top),
        "tickangle": 0,
        "tickfont": {"size": theme.SMALL_SIZE, "color": theme.INK},
        "title": {"text": words, "side": "bottom", "font": {"size": theme.SMALL_SIZE, "color": theme.MUTED}},
    }


def colour_ticks(top: float) -> dict[str, Any]:
    """Ticks at round numbers from zero, and at the top of the scale."""
    power = 10 ** np.floor(np.log10(top))
    step = next(s * power for s in (0.1, 0.2, 0.25, 0.5, 1, 2, 2.5, 5) if top / (s * power) <= 4)
    values = [float(v) for v in np.arange(0, top, step) if v <= 0.78 * top] + [top]
    return {"tickmode": "array", "tickvals": values, "ticktext": [f"{v:.3g}" for v in values]}
