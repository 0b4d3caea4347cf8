"""Labelled places on an x axis: lines, tinted stretches, and bars along the top of a panel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import plotly.graph_objects as go

from . import theme
from .scales import Across
from .text import escape, unescape

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
