"""The paper's table with ours, the paper's figure and the difference in every cell: of edits, and of abilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..report import Table
from .base import How
from .edited import Cited, EditedRecipe
from .result import MISSING, RecipeRun
from .values import text

if TYPE_CHECKING:
    from ..experiments import Row


SCALE = 100.0
"""From kt's unit (shares, bits) to the papers' (percent, hundredths of a bit)."""


@dataclass(frozen=True, kw_only=True)
class TableRecipe(EditedRecipe):
    """`columns`: the paper's name of each, and the metric behind it (in percent, and so is fluency, as the papers print
    it; another factor in `scales`). Of a column in `apart` the paper's figure is of something else: it is shown without
    a difference. `axis`: what varies beside the method: `edits`, `alpha`, another option, or ``."""

    columns: Mapping[str, str]
    axis: str = ""
    values: tuple[float | str, ...] = ()
    scales: Mapping[str, float]
    apart: tuple[str, ...] = ()


class Cell(NamedTuple):
    """One figure, in the paper's unit (percent; fluency in hundredths of a bit; perplexity as it is)."""

    model: str
    at: float | str | None
    row: str
    column: str
    mean: float | None
    ci95: tuple[float, float] | None
    n: int
    paper: Cited | None
    comparable: bool

    @property
    def difference(self) -> float | None:
        """Ours less the paper's; None where one of them is not there, and where it has no meaning: in a smoke run, or
        for a column that the paper measures on something else."""
        if not self.comparable or self.mean is None or self.paper is None:
            return None
        return self.mean - self.paper.value

    @property
    def within(self) -> bool | None:
        """Whether the paper's figure lies in our 95% interval."""
        if self.difference is None or self.ci95 is None or self.paper is None:
            return None
        return self.ci95[0] <= self.paper.value <= self.ci95[1]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        about = {"model": self.model, "at": self.at, "row": self.row, "column": self.column, "n": self.n}
        cited = None if self.paper is None else self.paper._asdict()
        ours = {"mean": self.mean, "ci95": self.ci95, "difference": self.difference, "within_ci95": self.within}
        return about | ours | {"paper": cited}

    def __str__(self) -> str:
        ours = MISSING if self.mean is None else f"{self.mean:.2f}"
        if self.ci95 is not None:
            ours += f" [{self.ci95[0]:.2f}, {self.ci95[1]:.2f}]"
        if self.paper is None:
            return ours
        width = "" if self.paper.half_width is None else f" ± {self.paper.half_width:g}"
        away = "" if self.difference is None else f" ({self.difference:+.2f})"
        return f"{ours} | {self.paper.value:g}{width}{away}"


@dataclass(frozen=True)
class TableRun(RecipeRun):
    """A run whose result is the paper's table: the cells, and the rows behind them by model."""

    recipe: TableRecipe
    cells: tuple[Cell, ...]
    rows: Mapping[str, Sequence[Row]]
    over: str
    """The records that intervals are over: `records` or `documents`."""

    @property
    def n_facts(self) -> int:
        return self.recipe.edits

    @property
    def legend(self) -> str:
        """How to read a cell."""
        text = f"each cell: ours [95% interval over {self.over}] | the paper's"
        return text if self.smoke else f"{text} (ours less the paper's)"

    def columns(self) -> list[str]:
        """The head of the table."""
        axis = [self.recipe.axis] if self.recipe.axis else []
        return ["model", *axis, "method", *self.recipe.columns, "n"]

    def lines(self) -> list[list[str]]:
        """The table: a line a model, place on the axis and row of the paper."""
        grouped: dict[tuple[str, float | str | None, str], list[Cell]] = {}
        for cell in self.cells:
            grouped.setdefault((cell.model, cell.at, cell.row), []).append(cell)
        rows = []
        for (model, at, row), cells in grouped.items():
            label = [place(at)] if at is not None else [MISSING] if self.recipe.axis else []
            rows.append([model, *label, row, *map(str, cells), str(max(cell.n for cell in cells))])
        return rows

    def tables(self) -> Sequence[Table]:
        return [Table(self.columns(), self.lines(), self.title, self.legend)]

    def held(self) -> dict[str, Any]:
        """`cells` as the table has them, `rows` by model as they were measured."""
        rows = {model: [row.as_dict() for row in rows] for model, rows in self.rows.items()}
        return {"columns": self.recipe.columns, "cells": [cell.as_dict() for cell in self.cells], "rows": rows}


def read_columns(path: Path, content: Mapping[str, Any]) -> dict[str, str]:
    """[columns]: the metric of each.

    Raises:
        BadFile: one is no text.
    """
    return {name: text(path, f"[columns] {name!r}", metric) for name, metric in content["columns"].items()}


def place(value: float | str | None) -> str:
    """A point's label: its place on the axis."""
    return "all" if value is None else value if isinstance(value, str) else f"{value:g}"


def cells_of(
    whole: TableRecipe,
    recipe: TableRecipe,
    how: How,
    model: str,
    rows: Sequence[Row],
    before: Mapping[str, Mapping[str, Any]],
) -> list[Cell]:
    """In the paper's order: by place on the axis, then by row; `before` has the unedited model's metrics.

    In a smoke run the places of `recipe` are not those of the `whole` paper, but it shows the figures that stand first
    there, so that the table has its form."""
    cells = []
    for number, value in enumerate(recipe.values or (None,)):
        for line in whole.rows:
            row = next((r for r in rows if (r.series, r.label) == (line.label, place(value))), None)
            metrics = before if line.unedited else {} if row is None else row.metrics
            at = value if not how.smoke or value is None or recipe.axis != "edits" else whole.values[number]
            cited = line.cited.get(model if at is None else f"{model}/{place(at)}")
            for i, (column, metric) in enumerate(recipe.columns.items()):
                paper = None if cited is None else cited[i]
                where = (how.shown(model), value, line.label, column)
                comparable = not how.smoke and column not in recipe.apart
                scale = recipe.scales.get(column, SCALE)
                cells.append(_cell(where, metrics.get(metric), scale, paper, comparable))
    return cells


def _cell(
    at: tuple[str, float | str | None, str, str],
    metric: Mapping[str, Any] | None,
    scale: float,
    paper: Cited | None,
    comparable: bool,
) -> Cell:
    if not metric or metric["mean"] is None:
        return Cell(*at, None, None, 0, paper, comparable)
    ends = metric["ci95"]
    ci95 = None if not ends else (scale * float(ends[0]), scale * float(ends[1]))
    return Cell(*at, scale * float(metric["mean"]), ci95, int(metric["n"]), paper, comparable)
