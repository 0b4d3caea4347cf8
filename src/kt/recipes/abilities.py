"""Recipes of general abilities: tasks of lm-eval before and after edits (IntAttn-Edit's supplement, table 5).

Each row is kept when it is done, as a sweep keeps its points: an interrupted run goes on there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._util.data import plain
from ..errors import BadFile
from .base import How, Keys, Kind
from .edited import TABLES, Cited, Line, edited_facts, read_edited, read_rows
from .table import TableRecipe, TableRun, cells_of, read_columns
from .values import is_number, number, refuse, text, texts

if TYPE_CHECKING:
    from ..capability.tasks import Chosen
    from ..experiments import Row
    from ..facts.fact import Fact
    from ..model.model import TracedModel


LABEL = "all"
"""A row's label where a sweep's points have their place on the axis."""


@dataclass(frozen=True, kw_only=True)
class AbilitiesRecipe(TableRecipe):
    """`columns` name metrics as `task/metric,filter`; `tasks` are lm-eval's, `limit` and `include_path` too."""

    kind = "abilities"
    takes = frozenset({"corpus", "statistics", "resume"})

    tasks: tuple[Any, ...]
    limit: float | None
    include_path: str | None

    def smoked(self) -> AbilitiesRecipe:
        """With tasks over demo facts, one of text for accuracies, one of whole texts for perplexities."""
        from .abilities_smoke import LIMIT, TASKS, metric_like

        columns = {column: metric_like(metric) for column, metric in self.columns.items()}
        return replace(super().smoked(), columns=columns, tasks=TASKS, limit=LIMIT, include_path=None)


def read(path: Path, content: Mapping[str, Any], shared: Mapping[str, Any]) -> AbilitiesRecipe:
    columns, abilities = read_columns(path, content), content["abilities"]
    apart = texts(path, "[abilities] apart", abilities.get("apart", []), least=0)
    edited = read_edited(path, content, one_seed="abilities are measured with one seed")
    if wrong := [metric for metric in columns.values() if "/" not in metric or "," not in metric]:
        raise BadFile(f"{path}: metric {wrong[0]!r}: write task/metric,filter, as gsm8k/exact_match,strict-match")
    if stray := {*content.get("scales", {}), *apart} - set(columns):
        raise BadFile(f"{path}: {min(stray)!r} is no column of the recipe; name one of {', '.join(columns)}")
    folder = abilities.get("include_path")
    return AbilitiesRecipe(
        **shared,
        **edited,
        rows=read_rows(path, content, len(columns), Cited.of),
        columns=columns,
        scales={name: number(path, f"[scales] {name!r}", scale) for name, scale in content.get("scales", {}).items()},
        apart=apart,
        tasks=_tasks(path, abilities["tasks"]),
        limit=_limit(path, abilities.get("limit")),
        include_path=None if folder is None else text(path, "[abilities] include_path", folder),
    )


def _tasks(path: Path, given: Any) -> tuple[Any, ...]:
    """Names of tasks, or tables with what lm-eval takes of one."""
    known = isinstance(given, list) and all(isinstance(task, str | dict) for task in given)
    if not known or not given or "" in given:
        refuse(path, "[abilities] tasks", given, 'a list of names of tasks, or tables as { task = "gsm8k" }')
    return tuple(given)


def _limit(path: Path, limit: Any) -> float | None:
    """How many documents a task, or which share of them."""
    if limit is None:
        return None
    if not is_number(limit) or limit <= 0 or (limit >= 1 and limit != int(limit)):
        refuse(path, "[abilities] limit", limit, "a whole number of documents from 1, or a share of them below 1")
    found: float = limit
    return found


def run(recipe: AbilitiesRecipe, how: How) -> TableRun:
    """Run the tasks once for each row and model, and make the paper's table."""
    from ..capability.tasks import choose, lm_eval_module

    lm_eval_module()  # before anything is fetched or loaded
    used = recipe.smoked() if how.smoke else recipe
    facts = edited_facts(used, how)
    rows_of: dict[str, list[Row]] = {}
    with _task_folder(used, how) as include_path:
        chosen = choose(list(used.tasks), include_path)
        for label, name in how.models.items():
            rows_of[label] = _model_rows(used, how, label, how.load(name), facts, chosen)
    before = {label: next((row.metrics for row in rows if not row.settings), {}) for label, rows in rows_of.items()}
    cells = [cell for m, rows in rows_of.items() for cell in cells_of(recipe, used, how, m, rows, before[m])]
    return TableRun(used, how.smoke, tuple(cells), rows_of, "documents")


@contextmanager
def _task_folder(recipe: AbilitiesRecipe, how: How) -> Iterator[str | Path | None]:
    if not how.smoke:
        yield recipe.include_path
        return
    from .abilities_smoke import written

    with written() as folder:
        yield folder


def _model_rows(
    recipe: AbilitiesRecipe, how: How, label: str, model: TracedModel, facts: list[Fact], chosen: Chosen
) -> list[Row]:
    """The unedited model's row, then one a method; finished ones are read from the folder."""
    from ..experiments import Point
    from ..experiments.sweep import identity_of
    from ..experiments.sweep_result import Kept
    from ..experiments.sweep_solving import Solver

    lines = [line for line in recipe.rows if line.method or line.unedited]
    options = [recipe.options_of(line, how.smoke) if line.method else {} for line in lines]
    points = [Point(LABEL, 0.0, o, line.label, None) for line, o in zip(lines, options, strict=True)]
    corpus, seed = how.corpus or recipe.corpus, recipe.seeds[0]
    settings = identity_of(model, facts, recipe.seeds, how.statistics, corpus, recipe.max_tokens) | {
        "kind": recipe.kind,
        "points": points,
        "tasks": list(recipe.tasks),
        "limit": recipe.limit,
    }
    kept = Kept(how.place(label), settings, how.goes_on(label))
    solver = Solver(model, [o for o in options if o], how.statistics, corpus, recipe.max_tokens)
    rows = []
    for at, (line, point) in enumerate(zip(lines, points, strict=True)):
        row = kept.row(at, point)
        if row is None:
            with how.stage(f"{label}: {line.label}") as tick:
                row = _measure(recipe, how, solver, facts, line, point.options, seed, chosen, tick)
            kept.add(at, point, row)
        rows.append(row)
    return rows


def _measure(
    recipe: AbilitiesRecipe,
    how: How,
    solver: Any,
    facts: list[Fact],
    line: Line[Cited],
    options: Mapping[str, Any],
    seed: int,
    chosen: Chosen,
    tick: Any,
) -> Row:
    from ..capability import abilities
    from ..experiments import Row

    start = time.perf_counter()
    edit = solver.edit(facts, options, seed, tick) if options else None
    solved = time.perf_counter()
    with nullcontext() if edit is None else edit.applied(solver.model):
        result = abilities(solver.model, chosen, limit=recipe.limit, seed=seed, batch_size=how.batch_size)
    metrics = {f"{row.task}/{row.metric}": row.before.as_dict() for row in result.rows}
    if missing := [metric for metric in recipe.columns.values() if metric not in metrics]:
        raise BadFile(f"recipe {recipe.name}: no metric {missing[0]!r}; the tasks give {', '.join(metrics)}")
    seconds = {"solve": round(solved - start, 3), "score": round(time.perf_counter() - solved, 3)}
    edits = len(facts) if options else 0
    return Row(LABEL, line.label, 0.0, edits, plain(dict(options)), plain(metrics), {}, seconds)


ABILITIES = Kind(
    {
        "": Keys(("abilities", "statistics", "columns", "scales", "rows"), ("abilities", "columns", "rows")),
        "abilities": Keys(("tasks", "limit", "include_path", "apart"), ("tasks",)),
        **TABLES,
    },
    read,
    run,
)
