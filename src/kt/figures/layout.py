"""Layout of figures: title, margins, legend, panels and axes, in pixels, so that nothing overlaps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from . import theme
from .text import escape, wrap


class Heading(NamedTuple):
    """A title with a subtitle, their height, and plotly's offset from the top, in pixels."""

    text: str
    height: int
    top: int


def heading(title: str, subtitle: str = "") -> Heading:
    """The escaped title and subtitle, wrapped."""
    first = wrap(title, theme.TITLE_WRAP)
    second = wrap(subtitle, theme.SUBTITLE_WRAP)
    small = f'<span style="font-size:{theme.TEXT_SIZE}px;color:{theme.MUTED}">'
    lines = [f"<b>{line}</b>" for line in first] + [f"{small}{line}</span>" for line in second]
    # Plotly positions one line by its capital height, but several by their first base line.
    top = 16 if len(lines) == 1 else 29
    return Heading("<br>".join(lines), 18 + 22 * len(lines) if lines else 10, top)


def frame(head: Heading, *, above: int, plot: int, below: int, left: int, right: int = 24) -> dict[str, Any]:
    """Plotly layout with a plot of `plot` pixels height and margins in pixels; the width is the browser's."""
    top = head.height + above
    height = top + plot + below
    return {
        "title": {
            "text": head.text,
            "font": {"size": theme.TITLE_SIZE, "color": theme.INK},
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            "y": 1 - head.top / height,
            "yref": "container",
            "yanchor": "top",
            "pad": {"l": 20},
        },
        "font": {"family": theme.FONT, "size": theme.TEXT_SIZE, "color": theme.INK},
        "margin": {"l": left, "r": right, "t": top, "b": below, "autoexpand": False},
        "height": height,
        "paper_bgcolor": theme.PAPER,
        "plot_bgcolor": theme.PAPER,
        "hoverlabel": {
            "bgcolor": theme.PAPER,
            "bordercolor": theme.MUTED,
            "align": "left",
            "font": {"family": theme.FONT, "size": theme.TEXT_SIZE, "color": theme.INK},
        },
        "template": "none",
    }


def legend(plot: int, above: int) -> dict[str, Any]:
    """A horizontal legend at the left, `above` pixels over a plot of `plot` pixels height."""
    return {
        "orientation": "h",
        "x": 0,
        "xanchor": "left",
        "y": 1 + above / plot,
        "yanchor": "bottom",
        "font": {"size": theme.TEXT_SIZE},
        "itemwidth": 40,
    }


def every(count: int, pixels: float, label: int = 24) -> int:
    """The step (1, 2, 5, 10, ...) at which labels of `label` pixels at `count` positions do not touch."""
    steps = [m * 10**e for e in range(5) for m in (1, 2, 5)]
    return next((s for s in steps if count / s * label <= pixels), count)


def layer_ticks(layers: Sequence[int], pixels: float) -> dict[str, Any]:
    """Ticks at positions 0, 1, ... that name the layers, as many as fit."""
    step = every(len(layers), pixels)
    shown = range(0, len(layers), step)
    return {"tickmode": "array", "tickvals": list(shown), "ticktext": [str(layers[i]) for i in shown]}


_GAP = 0.11
"""Gap between panels of a row, for ticks and title of a y axis, as a fraction of the plot's width."""


class Grid(NamedTuple):
    """Panels of one size in rows, filled from the top left; `panel` and `between` are heights in pixels."""

    columns: int
    rows: int
    panel: int
    between: int

    @classmethod
    def of(cls, count: int, columns: int | None = None, over: int = 0) -> Grid:
        """The fewest rows of at most `columns` panels, evenly filled: four panels with `columns=3` form two by two.

        `over`: pixels that each panel needs above it.
        """
        rows = ceil(count / (columns or count))
        return cls(ceil(count / rows), rows, 290 if rows == 1 else 220, 46 + over)

    @property
    def height(self) -> int:
        """Pixels of all rows and the gaps between them."""
        return self.rows * self.panel + (self.rows - 1) * self.between

    @property
    def share(self) -> float:
        """The width of one panel, as a fraction of the plot's."""
        return (1 - _GAP * (self.columns - 1)) / self.columns

    def domains(self, index: int) -> tuple[tuple[float, float], tuple[float, float]]:
        """The domains of the panel's x and y axes, from 0 to 1."""
        row, column = divmod(index, self.columns)
        left = column * (self.share + _GAP)
        top = 1 - row * (self.panel + self.between) / self.height
        return (left, min(1.0, left + self.share)), (max(0.0, top - self.panel / self.height), top)


def axis_suffix(index: int) -> str:
    """Plotly's suffix of the axis names of panel `index`: "", "2", "3", ..."""
    return "" if index == 0 else str(index + 1)


def legend_rows(names: Sequence[str], pixels: float) -> int:
    """The number of rows into which plotly breaks a legend of these names."""
    rows, used = 1, 0.0
    for name in names:
        needed = 60 + 7.2 * len(name)
        if used and used + needed > pixels:
            rows, used = rows + 1, 0.0
        used += needed
    return rows


EMBEDDING = -1
"""The x of the embedding (the input of block 0) on an axis of layers."""

SCALES = ("linear", "log", "rank")
"""Scales of a y axis; on "rank", rank 0 is at the top."""

SMALL = 1e-3
"""Below it a linear axis writes 2e-5, not 0.00002, which would reach into the axis's title."""

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_PAD = 0.05
"""Margin beyond the outermost value, as a fraction of the axis."""


class Across(NamedTuple):
    """An x axis: its two ends, and its length in pixels."""

    low: float
    high: float
    pixels: float

    @classmethod
    def of(cls, x: Iterable[float], pixels: float, wide: bool = False) -> Across:
        """An axis around these values; `wide` adds room for marks that extend half a step beyond them."""
        values = [float(v) for v in x]
        pad = 0.03 * (max(values) - min(values)) or 0.5
        pad = max(pad, 0.5) if wide else pad
        return cls(min(values) - pad, max(values) + pad, pixels)

    def pixel(self, x: float) -> float:
        """The distance of `x` from the axis's left end in pixels."""
        return (x - self.low) / (self.high - self.low) * self.pixels


def x_axis(x: Iterable[float], title: str, across: Across, layers: bool) -> dict[str, Any]:
    """A plotly axis for these values; on an axis of `layers`, x = -1 is labelled as the embedding."""
    values = sorted({float(v) for v in x})
    label = max(28, 8 * len(f"{values[-1]:g}") + 8)
    integral = all(v == round(v) for v in values)
    step = every(int(values[-1] - values[0]) + 1, across.pixels, label)
    ticks: dict[str, Any] = {"dtick": step, "tick0": 0} if integral else {"nticks": 8}
    if integral and layers and values[0] == EMBEDDING:
        shown = [v for v in range(0, int(values[-1]) + 1, step) if across.pixel(v) - across.pixel(EMBEDDING) > label]
        texts = ["emb.", *map(str, shown)]
        ticks = {"tickmode": "array", "tickvals": [EMBEDDING, *shown], "ticktext": texts, "tickangle": 0}
    return theme.axis(title=escape(title), range=[across.low, across.high], showgrid=False, **ticks)


def axis_coordinates(values: Sequence[float] | Float[ndarray, " x"], scale: str) -> list[float | None]:
    """The coordinates of values on an axis of this scale; None is a gap.

    Ranks are drawn at rank + 1, since 0 has no logarithm. On `log`, values of 0 or less become gaps.
    """
    numbers = np.asarray(values, dtype=float)
    if scale == "rank":
        # Intervals of means can be below 0 by rounding.
        numbers = np.maximum(numbers, 0) + 1
    elif scale == "log":
        numbers = np.where(numbers > 0, numbers, np.nan)
    return [float(v) if np.isfinite(v) else None for v in numbers]


def y_axis(values: Iterable[float], scale: str, pixels: int, fixed: bool = False) -> dict[str, Any]:
    """Fields of a plotly axis, `pixels` long, for values (means and ends of intervals) in their own units.

    Logarithmic axes always have a range; a linear axis has one only if `fixed`, for panels that share it.

    Raises:
        ValueError: the scale is not in `SCALES`.
    """
    numbers = np.array([v for v in values if np.isfinite(v)], dtype=float)
    if scale == "linear":
        span = {"range": _linear_range(numbers)} if fixed and numbers.size else {"rangemode": "tozero"}
        small = 0 < np.abs(numbers).max(initial=0.0) < SMALL
        return {**span, **({"exponentformat": "e"} if small else {"tickformat": "~g"}), "nticks": 7}
    if scale == "rank":
        return _rank_axis(numbers, pixels)
    if scale == "log":
        return _log_axis(numbers[numbers > 0], pixels)
    raise ValueError(f"scale {scale!r} is unknown; choose among {', '.join(SCALES)}")


def _linear_range(numbers: Float[ndarray, " value"]) -> list[float]:
    low, high = min(0.0, numbers.min()), max(0.0, numbers.max())
    pad = _PAD * (high - low) or 1.0
    return [float(low - pad * (low < 0)), float(high + pad)]


def _rank_axis(numbers: Float[ndarray, " value"], pixels: int) -> dict[str, Any]:
    """An axis from just below the worst rank (bottom) to just above rank 0, with ticks labelled by rank."""
    decades = float(np.log10(1 + max(9.0, numbers.max(initial=0.0))))
    ticks = [0, *(10**power for power in range(1, int(decades) + 1))]
    if pixels / decades > 80:
        ticks += [3 * 10**power for power in range(int(decades) + 1)] + [1]
    ticks = sorted(rank for rank in ticks if rank <= 10**decades)
    pad = _PAD * decades
    return {
        "type": "log",
        "range": [decades + pad, -pad],
        "tickmode": "array",
        "tickvals": [rank + 1 for rank in ticks],
        "ticktext": [f"{rank:,}" for rank in ticks],
    }


def _log_axis(numbers: Float[ndarray, " value"], pixels: int) -> dict[str, Any]:
    """An axis around positive values, with ticks at powers of ten, and between them if there are few."""
    ends = (numbers.min(), numbers.max()) if numbers.size else (0.1, 1.0)
    low, high = (float(v) for v in np.log10(ends))
    pad = _PAD * (high - low) or 0.5
    low, high = low - pad, high + pad
    powers = range(int(np.floor(low)), int(np.ceil(high)) + 1)
    if high - low < 2:
        values = [(m * 10.0**power, f"{m * 10.0**power:.3g}") for power in powers for m in (1, 2, 5)]
    else:
        # Plotly's default labels of powers are a quarter larger than the tick labels of other axes.
        step = max(1, round((high - low) * 28 / pixels))
        values = [(10.0**power, f"10{str(power).translate(_RAISED)}") for power in powers if power % step == 0]
    shown = [(value, text) for value, text in values if low <= np.log10(value) <= high]
    return {
        "type": "log",
        "range": [low, high],
        "tickmode": "array",
        "tickvals": [value for value, _ in shown],
        "ticktext": [text for _, text in shown],
    }
