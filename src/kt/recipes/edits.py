"""Recipes of edits: one sweep a model over rows times an axis, then the paper's table from its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadFile
from ..report import Figure
from .base import How, Keys, Kind
from .edited import (
    OF_THE_RUN,
    SMOKE_EDITS,
    TABLES,
    Cited,
    Line,
    check_options,
    edited_facts,
    read_edited,
    read_rows,
)
from .table import TableRecipe, TableRun, cells_of, place, read_columns
from .values import is_number, once, refuse, text

if TYPE_CHECKING:
    from ..experiments import Point, Sweep


AS_IT_IS = ("perplexity_heldout", "text_words_gen")
"""Metrics that stand in a table as they are; the others in percent, entropies in hundredths of a bit."""


@dataclass(frozen=True, kw_only=True)
class EditsRecipe(TableRecipe):
    """A table of edits, scored by `kt.evaluate`."""

    kind = "edits"
    takes = frozenset({"corpus", "statistics", "resume"})

    def limited(self, limit: int | None) -> EditsRecipe:
        """With an axis of edits, only the places up to the limit."""
        fewer = super().limited(limit)
        if self.axis != "edits" or fewer is self:
            return fewer
        most = fewer.edits
        return replace(fewer, values=(*(v for v in self.values if isinstance(v, float) and v < most), float(most)))

    def smoked(self) -> EditsRecipe:
        """At its smallest: first model, two or three places on the axis, one seed."""
        values: tuple[float | str, ...] = ()
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
    columns, edited = read_columns(path, content), read_edited(path, content)
    axis, values = _axis(path, content.get("axis"), edited["n_facts"])
    rows = read_rows(path, content, len(columns), Cited.of, [place(value) for value in values])
    if axis != "edits":
        _check_axis(path, axis, values, rows)
    return EditsRecipe(
        **shared,
        **edited,
        rows=rows,
        columns=columns,
        axis=axis,
        values=values,
        scales={column: 1.0 for column, metric in columns.items() if metric in AS_IT_IS},
    )


def _axis(path: Path, axis: Any, most: int) -> tuple[str, tuple[float | str, ...]]:
    """[axis]: its name and its values; `` and none where there is none.

    Raises:
        BadFile: no values, one that is no number or text, one that is named twice, or edits that there are not.
    """
    if axis is None:
        return "", ()
    name, values = text(path, "[axis] name", axis["name"]), axis["values"]
    if not isinstance(values, list) or not values or not all(is_number(v) or isinstance(v, str) for v in values):
        refuse(path, "[axis] values", values, "a list of numbers, or of texts")
    for value in values:
        if isinstance(value, str):
            text(path, "[axis] values", value)
    once(path, "[axis] values", tuple(map(place, values)))
    if name != "edits":
        return name, tuple(values)
    if any(isinstance(n, str) or n != int(n) or not 1 <= n <= most for n in values):
        raise BadFile(f"{path}: [axis] edits between 1 and data.edits = {most} facts; correct its values")
    return name, tuple(map(float, values))


def _check_axis(path: Path, name: str, values: Sequence[float | str], rows: Sequence[Line[Cited]]) -> None:
    """Refuse an axis that a row has as an option already, or that its method does not take.

    Raises:
        BadFile: there is one.
    """
    if name in OF_THE_RUN:
        raise BadFile(f"{path}: [axis] name is {name!r}, which the recipe or its run gives; name another option")
    for row in rows:
        if name in row.options:
            raise BadFile(f"{path}: row {row.label!r}: options hold {name!r}, which is the axis; leave it out there")
        for value in values if row.method else ():
            check_options(f"{path}: [axis], row {row.label!r}", str(row.method), {**row.options, name: value})


def run(recipe: EditsRecipe, how: How) -> EditsRun:
    """One sweep a model; finished points are kept in `how.folder`.

    Raises:
        BadFile: a column of a metric that kt does not have.
    """
    from ..evaluation.metrics import protocols_of
    from ..experiments.sweep import sweep

    check_metrics(recipe)
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
            protocols=protocols_of(used.columns.values()),
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
        for number, value in enumerate(recipe.values or (None,)):
            at = {} if value is None or recipe.axis == "edits" else {recipe.axis: value}
            edits = int(value) if value is not None and recipe.axis == "edits" else None
            x = number if isinstance(value, str) else value or 0.0  # texts stand in the recipe's order
            points.append(Point(place(value), x, options | at, line.label, edits))
    return points


def check_metrics(recipe: EditsRecipe) -> None:
    """Refuse a column of a metric that kt does not have; when it runs, as the metrics load torch.

    Raises:
        BadFile: there is one.
    """
    from ..evaluation.metrics import COMPOSITES, METRICS, PERPLEXITY, base_of, protocols_of

    for column, metric in recipe.columns.items():
        if base_of(metric)[0] in METRICS and not protocols_of([metric]):
            raise BadFile(
                f"recipe {recipe.name}: [columns] {column!r}: {metric} is of kt eval --kl alone; name another"
            )
        if not protocols_of([metric]):
            near = get_close_matches(metric, [*METRICS, *COMPOSITES, PERPLEXITY], 1)
            hint = f"did you mean {near[0]}?" if near else "docs/evaluation.md has them"
            raise BadFile(f"recipe {recipe.name}: [columns] {column!r}: no metric {metric!r}; {hint}")


EDITS = Kind(
    {
        "": Keys(("statistics", "columns", "axis", "rows"), ("columns", "rows")),
        "axis": Keys(("name", "values"), ("name", "values")),
        **TABLES,
    },
    read,
    run,
)
