"""Diagonal lines over cells of a heatmap, drawn as one trace: these cells are not told apart from zero."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from ..significance import smallest_p
from .panel import Panel

_STEP = 8.0
"""Pixels between two lines, along a row."""


class Lines(NamedTuple):
    """Ends of segments in cells (layer across, row down), with None between two segments."""

    x: list[float | None]
    y: list[float | None]


def hatch(cells: Bool[ndarray, "row layer"], width: float, height: float) -> Lines:
    """Lines at 45 degrees through the marked cells, where a cell is `width` by `height` pixels.

    They run on from cell to cell: neighbours of a row are cut as one rectangle, and all lines stand on one raster.
    """
    x: list[float | None] = []
    y: list[float | None] = []
    for row, first, last in _rectangles(cells):
        left, right, top, bottom = first * width, (last + 1) * width, row * height, (row + 1) * height
        for c in np.arange(np.ceil((left + top) / _STEP) * _STEP, right + bottom, _STEP):
            ends = max(left, c - bottom), min(right, c - top)
            if ends[1] - ends[0] > 1e-9:
                x += [*(end / width - 0.5 for end in ends), None]
                y += [*((c - end) / height - 0.5 for end in ends), None]
    return Lines(x[:-1], y[:-1])


def hatch_note(panels: Sequence[Panel]) -> str:
    """What hatching means, why there is none, or nothing where nothing was tested or every cell stands out."""
    if any(panel.hatched.any() for panel in panels):
        panel = next(panel for panel in panels if panel.hatched.any())
        rate = f"{100 * panel.alpha:g}%"
        said = f"hatched: not told apart from zero (sign-flip test over {panel.over}, false discovery rate {rate}"
        # Below this n a lone cell cannot stand out, however large its effect: the test has too few ways to flip.
        least = float(np.nanmin(smallest_p(panel.grid(panel.n)), initial=np.inf))
        few = np.isfinite(least) and least * panel.tested.sum() > panel.alpha
        return said + (f"; so few {panel.over} give no p below {least:.2g})" if few else ")")
    if any(panel.tested.any() for panel in panels) and not any(panel.testable for panel in panels):
        return f"no cell can be told apart from zero with so few {panels[0].over} (sign-flip test)"
    return ""


def _rectangles(cells: Bool[ndarray, "row layer"]) -> Iterator[tuple[int, int, int]]:
    """Runs of marked neighbours as (row, first, last)."""
    for row, marked in enumerate(cells):
        edges = np.flatnonzero(np.diff(np.concatenate([[False], marked, [False]]).astype(np.int8)))
        for first, stop in edges.reshape(-1, 2):
            yield row, int(first), int(stop) - 1
