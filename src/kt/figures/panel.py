"""One grid of effects with what its hovers say, and which of its cells are not told apart from zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from ..significance import smallest_p
from . import theme
from .text import escape, interval_line, number, readable_token


@dataclass(frozen=True, eq=False)
class Panel:
    """One kind's grid of effects.

    A cell without a finite value is drawn as such. `p` and `q` are of the test that a cell's mean is 0; cells whose
    `q` is at least `alpha` are hatched. `over` names the records that n counts.
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
        """Any of `low`, `high`, `n`, `p`, `q` cell by cell; a vector holds one number per row."""
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
        return theme.look(self.kind).label if self.title is None else self.title

    @property
    def tested(self) -> Bool[ndarray, "row layer"]:
        """Cells that have a value and a q."""
        return np.isfinite(self.values) & np.isfinite(self.grid(self.q))

    @property
    def testable(self) -> bool:
        """Whether any cell could come out below `alpha`: the test's least p depends on n (see significance.py)."""
        too_few = smallest_p(self.grid(self.n)) >= self.alpha  # an unknown n may be large enough
        return bool((self.tested & ~too_few).any())

    @property
    def hatched(self) -> Bool[ndarray, "row layer"]:
        """Cells not told apart from zero. None are where n is too small for any: that says nothing about a cell."""
        return self.tested & (self.grid(self.q) >= self.alpha) & self.testable

    def hovers(self) -> list[list[str]]:
        return [[self._hover(r, c) for c in range(self.values.shape[1])] for r in range(self.values.shape[0])]

    def _hover(self, row: int, column: int) -> str:
        assert self.layers is not None
        subject = ", subject" * (row in set(self.subject_rows))
        place = f"  ({escape(self.row_word)} {row}{subject})" if self.row_word else ""
        lines = [f"<b>{escape(readable_token(self.rows[row], 60))}</b>{place}"]
        lines.append(f"{escape(theme.look(self.kind).label)}, layer {self.layers[column]}")
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
