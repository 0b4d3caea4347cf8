"""Where the panels of one figure stand, and how much room their legend takes."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

_GAP = 0.11
"""Between panels of a row, as a part of the plot's width: the ticks and title of the next panel's y axis."""


class Grid(NamedTuple):
    """Panels of one size in rows, filled from the top left; heights are pixels."""

    columns: int
    rows: int
    panel: int
    between: int

    @classmethod
    def of(cls, count: int, columns: int | None = None, over: int = 0) -> Grid:
        """The fewest rows of at most `columns`, evenly filled: four panels by threes stand two by two.

        `over`: pixels that each panel needs above it.
        """
        rows = ceil(count / (columns or count))
        return cls(ceil(count / rows), rows, 290 if rows == 1 else 220, 46 + over)

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


def axis_suffix(place: int) -> str:
    """What plotly puts behind the names of the axes of the panel at `place`: nothing, 2, 3, ..."""
    return "" if place == 0 else str(place + 1)


def legend_rows(names: Sequence[str], pixels: float) -> int:
    """The rows that plotly breaks a legend of these names into."""
    rows, used = 1, 0.0
    for name in names:
        needed = 60 + 7.2 * len(name)
        if used and used + needed > pixels:
            rows, used = rows + 1, 0.0
        used += needed
    return rows
