"""A recipe's result: the paper's table with ours, the paper's figure and the difference in every cell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..artifacts import plain
from ..sweep import Sweep
from .reading import Cited, PaperRecipe

SMOKE = "SMOKE RUN on the demo model and demo facts: these figures are not the paper's and say nothing about them"
MISSING = "–"


class Cell(NamedTuple):
    """One figure, in the paper's unit (percent; fluency in hundredths of a bit)."""

    model: str
    at: float | None
    row: str
    column: str
    mean: float | None
    ci95: tuple[float, float] | None
    n: int
    paper: Cited | None
    smoke: bool

    @property
    def difference(self) -> float | None:
        """Ours less the paper's; None where one of them is not there, and in a smoke run, where it has no meaning."""
        if self.smoke or self.mean is None or self.paper is None:
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
class RecipeRun:
    """What `run_recipe` returns: the cells, and the sweep of each model behind them."""

    recipe: PaperRecipe
    cells: tuple[Cell, ...]
    sweeps: Mapping[str, Sweep]
    smoke: bool

    @property
    def legend(self) -> str:
        """How to read a cell."""
        said = "each cell: ours [95% interval over records] | the paper's"
        return f"{SMOKE}; {said}" if self.smoke else f"{said} (ours less the paper's)"

    def columns(self) -> list[str]:
        """The head of the table."""
        axis = [self.recipe.axis] if self.recipe.axis else []
        return ["model", *axis, "method", *self.recipe.columns, "n"]

    def lines(self) -> list[list[str]]:
        """The table: a line a model, place on the axis and row of the paper."""
        grouped: dict[tuple[str, float | None, str], list[Cell]] = {}
        for cell in self.cells:
            grouped.setdefault((cell.model, cell.at, cell.row), []).append(cell)
        found = []
        for (model, at, row), cells in grouped.items():
            place = [f"{at:g}"] if at is not None else [MISSING] if self.recipe.axis else []
            found.append([model, *place, row, *map(str, cells), str(max(cell.n for cell in cells))])
        return found

    def markdown(self) -> str:
        """The table with its source, what to read it with, and what the paper leaves open."""
        head = self.columns()
        lines = [f"# {self.recipe.place}: {self.recipe.summary}", "", f"{self.recipe.paper}. {self.legend}.", ""]
        lines += ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
        lines += ["| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in self.lines()]
        lines += ["", *(f"- {note}" for note in self.recipe.notes)]
        return "\n".join(lines) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: `cells` as the table has them, `rows` by model as the sweeps have them."""
        about = ("name", "summary", "paper", "place", "notes", "columns")
        found: dict[str, Any] = {name: getattr(self.recipe, name) for name in about}
        found |= {"smoke": self.smoke, "warning": SMOKE if self.smoke else None}
        found["cells"] = [cell.as_dict() for cell in self.cells]
        found["rows"] = {model: [row.as_dict() for row in sweep.rows] for model, sweep in self.sweeps.items()}
        return dict(plain(found))


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
