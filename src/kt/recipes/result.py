"""What a recipe's run gives, whatever its kind: tables, figures, files, and the same as JSON."""

from __future__ import annotations

import html
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .._util.data import plain
from .base import PaperRecipe

if TYPE_CHECKING:
    import plotly.graph_objects as go


SMOKE = "SMOKE RUN on the demo model and demo facts: these figures are not the paper's and say nothing about them"
MISSING = "–"


class Table(NamedTuple):
    """Plain text: a title, heads, lines of cells, and a note (how to read a cell, what was left out)."""

    title: str
    columns: Sequence[str]
    lines: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class RecipeRun(ABC):
    """What `run_recipe` returns."""

    recipe: PaperRecipe
    smoke: bool

    @property
    @abstractmethod
    def n_facts(self) -> int:
        """How many facts went in."""

    @abstractmethod
    def tables(self) -> list[Table]:
        """The paper's table first; what explains it after."""

    @abstractmethod
    def held(self) -> dict[str, Any]:
        """The kind's own part of the JSON."""

    def figures(self) -> dict[str, go.Figure]:
        """By name, where the paper has a figure."""
        return {}

    def save(self, folder: Path) -> None:  # noqa: B027 (most kinds have no more than figures and JSON)
        """Write what the result rests on."""

    @property
    def title(self) -> str:
        """Which paper, and where in it."""
        return f"{self.recipe.paper}, {self.recipe.place}"

    def markdown(self) -> str:
        """The tables with their source, how to read them, and what the paper leaves open."""
        recipe = self.recipe
        lines = [f"# {recipe.place}: {recipe.summary}", "", f"{recipe.paper}." + f" {SMOKE}." * self.smoke]
        for table in self.tables():
            lines += ["", *([f"## {table.title}", ""] if table.title != self.title else [])]
            lines += [f"{table.note}.", ""] if table.note else []
            lines += [_line(table.columns), _line(["---"] * len(table.columns)), *map(_line, table.lines)]
        lines += ["", *(f"- {note}" for note in recipe.notes)]
        return "\n".join(lines) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: what every kind has, then its own."""
        about = ("name", "kind", "summary", "paper", "place", "notes")
        found: dict[str, Any] = {name: getattr(self.recipe, name) for name in about}
        found |= {"smoke": self.smoke, "warning": SMOKE if self.smoke else None, "n_facts": self.n_facts}
        return dict(plain(found | self.held()))


def _line(cells: Sequence[str]) -> str:
    """A line of a table; what a model wrote is no mark-up."""
    return "| " + " | ".join(html.escape(c, quote=False).replace("|", "\\|").replace("\n", " ") for c in cells) + " |"
