"""`RecipeRun`, the result of a recipe of any kind: tables, figures, files, JSON."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._util.data import plain
from ..report import Shown, Table
from .base import PaperRecipe

SMOKE = "SMOKE RUN on the demo model and demo facts: these figures are not the paper's and say nothing about them"
MISSING = "–"


@dataclass(frozen=True)
class RecipeRun(Shown, ABC):
    """The result of `run_recipe`."""

    recipe: PaperRecipe
    smoke: bool

    kind = "recipe"

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The recipe, and whether it ran in smoke mode."""
        return {"recipe": self.recipe.name, "kind": self.recipe.kind, "smoke": self.smoke}

    @property
    @abstractmethod
    def n_facts(self) -> int:
        """The number of facts."""

    @abstractmethod
    def tables(self) -> Sequence[Table]:
        """The paper's table first; then the tables that explain it."""

    @abstractmethod
    def held(self) -> dict[str, Any]:
        """The kind's own part of the JSON."""

    def save(self, folder: Path) -> None:
        """Write the measurements behind the result."""

    @property
    def title(self) -> str:
        """The paper, and the section in it."""
        return f"{self.recipe.paper}, {self.recipe.place}"

    def markdown(self) -> str:
        """The tables with their source, how to read them, and what the paper leaves open."""
        recipe = self.recipe
        lines = [f"# {recipe.place}: {recipe.summary}", "", f"{recipe.paper}." + f" {SMOKE}." * self.smoke]
        for table in self.tables():
            lines += ["", *([f"## {table.title}", ""] if table.title != self.title else [])]
            lines += [f"{table.caption}.", ""] if table.caption else []
            lines.append(table.markdown())
        lines += ["", *(f"- {note}" for note in recipe.notes)]
        return "\n".join(lines) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: the fields of every kind, then the kind's own."""
        about = ("name", "kind", "summary", "paper", "place", "notes")
        content: dict[str, Any] = {name: getattr(self.recipe, name) for name in about}
        content |= {"smoke": self.smoke, "warning": SMOKE if self.smoke else None, "n_facts": self.n_facts}
        return dict(plain(content | self.held()))
