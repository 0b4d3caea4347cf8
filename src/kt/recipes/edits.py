"""Recipes of edits: one sweep a model over rows times an axis, then the paper's table from its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadFile
from ..report import Figure
from .base import How, Keys, Kind
from .edited import SMOKE_EDITS, TABLES, Cited, edited_facts, read_edited, read_rows
from .table import TableRecipe, TableRun, cells_of, place

if TYPE_CHECKING:
    from ..experiments import Point, Sweep


@dataclass(frozen=True, kw_only=True)
class EditsRecipe(TableRecipe):
    """A table of edits, scored by `kt.evaluate`."""

    kind = "edits"
    takes = frozenset({"corpus", "statistics", "resume"})

    @property
    def protocols(self) -> tuple[str, ...]:
        """The ways to ask that the columns need; a metric's name says which."""
        words = {word for metric in self.columns.values() for word in metric.split("_")}
        return tuple(way for way in ("tf", "gen", "prob", "wild", "ppl") if way in words)

    def limited(self, limit: int | None) -> EditsRecipe:
        """With an axis of edits, only the places up to the limit."""
        fewer = super().limited(limit)
        if self.axis != "edits" or fewer is self:
            return fewer
        most = fewer.edits
        return replace(fewer, values=(*(value for value in self.values if value < most), float(most)))

    def smoked(self) -> EditsRecipe:
        """At its smallest: first model, two or three places on the axis, one seed."""
        values: tuple[float, ...] = ()
        if self.axis == "edits":
            values = tuple(float(n) for n in SMOKE_EDITS[: len(self.values)])
        elif self.values:
            values = tuple(dict.fromkeys(self.values[i] for i in (0, len(self.values) // 2, -1)))
        return replace(super().smoked(), values=values)


@dataclass(frozen=True)
class EditsRun(TableRun):
    """The table, and the sweep of each model behind it."""

    sweeps: Mapping[str, Sweep]

    def figures(self) -> Sequence[Figure]:
        """The curves over the paper's axis, if it has one."""
        return [Figure(s.figure(), name=label) for label, s in self.sweeps.items()] if self.recipe.axis else []


def read(path: Path, content: Mapping[str, Any], shared: Mapping[str, Any]) -> EditsRecipe:
    axis, columns = content.get("axis", {}), dict(content["columns"])
    values, edited = tuple(float(value) for value in axis.get("values", ())), read_edited(path, content)
    if axis.get("name") == "edits" and any(n != int(n) or not 1 <= n <= edited["n_facts"] for n in values):
        raise BadFile(f"{path}: [axis] edits between 1 and data.edits = {edited['n_facts']} facts; correct its values")
    return EditsRecipe(
        **shared,
        **edited,
        rows=read_rows(path, content, len(columns), Cited.of, values),
        columns=columns,
        axis=axis.get("name", ""),
        values=values,
        scales={},
    )


def run(recipe: EditsRecipe, how: How) -> EditsRun:
    """One sweep a model; finished points are kept in `how.folder`."""
    from ..experiments.sweep import sweep

    used = recipe.smoked() if how.smoke else recipe
    facts = edited_facts(used, how)
    points = _points(used, how.smoke)
    sweeps: dict[str, Sweep] = {}
    for label, name in how.models.items():
        model = how.load(name)
        sweeps[label] = sweep(
            model,
            facts,
            points,
            kind=used.axis or "methods",
            folder=how.place(label),
            resume=how.goes_on(label),
            protocols=used.protocols,
            seeds=used.seeds,
            statistics=how.statistics,
            corpus=how.corpus or used.corpus,
            max_tokens=used.max_tokens,
            batch_size=how.batch_size,
            stage=how.stage,
        )
        del model
    cells = [cell for label, by in sweeps.items() for cell in cells_of(recipe, used, how, label, by.rows, by.before)]
    return EditsRun(used, how.smoke, tuple(cells), {m: by.rows for m, by in sweeps.items()}, "records", sweeps)


def _points(recipe: EditsRecipe, smoke: bool) -> list[Point]:
    """Rows times places on the axis, for the rows that are edits."""
    from ..experiments import Point

    points = []
    for line in recipe.rows:
        if line.method is None:
            continue
        options = recipe.options_of(line, smoke)
        for value in recipe.values or (None,):
            at = {} if value is None or recipe.axis == "edits" else {recipe.axis: value}
            edits = int(value) if value is not None and recipe.axis == "edits" else None
            points.append(Point(place(value), value or 0.0, options | at, line.label, edits))
    return points


EDITS = Kind(
    {
        "": Keys(("statistics", "columns", "axis", "rows"), ("columns", "rows")),
        "axis": Keys(("name", "values"), ("name", "values")),
        **TABLES,
    },
    read,
    run,
)
