"""Run a recipe: its rows times its axis as the points of one sweep a model, then the paper's table from their rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadFile, KtError
from ..facts.fact import Fact
from ..progress import Stage
from ..sweep import Point, Sweep, distinct, sweep
from .reading import Line, PaperRecipe
from .table import Cell, RecipeRun

if TYPE_CHECKING:
    from ..model import TracedModel

SMOKE_EDITS = (2, 3)
SMOKE_STEPS = {"v_num_grad_steps": 3, "num_steps": 3}
SMOKE_TOKENS = 5_000
OF_SIZE = ("layers", "mom2_", "nullspace", "L2")
"""Options that are in units of one model, and so are left to the demo model's own preset in a smoke run."""


def run_recipe(
    recipe: PaperRecipe,
    load: Callable[[str], TracedModel],
    facts: Sequence[Fact] | None = None,
    *,
    models: Mapping[str, str] | None = None,
    smoke: bool = False,
    folder: str | Path | None = None,
    resume: bool = False,
    batch_size: int | str = "auto",
    corpus: str | None = None,
    statistics: str | Path | None = None,
    stage: Stage | None = None,
) -> RecipeRun:
    """The paper's table, ours beside its figures.

    Args:
        load: from a model's id to the model; one model is held at a time.
        facts: in place of the recipe's own.
        models: in place of the recipe's own, by its labels: {"qwen2.5-7b": "/path/or/id"}.
        smoke: the demo model on demo facts, few steps, few edits, one seed: that it runs, not what it gives.
        folder, resume: as in `sweep`, one folder a model inside.
        corpus, statistics: second moments, in place of the recipe's corpus.

    Raises:
        BadFile: the recipe's data has to be fetched by hand.
        KtError: a model label that the recipe does not have, too few facts, or what `sweep` raises.
    """
    asked = smoked(recipe) if smoke else recipe
    chosen = dict(asked.models if models is None or smoke else models)
    found: dict[str, Sweep] = {}
    own = _facts(asked, facts, smoke)
    points = _points(asked, smoke)
    for label, name in chosen.items():
        model = load(name)
        found[label] = sweep(
            model,
            own,
            points,
            kind=asked.axis or "methods",
            folder=None if folder is None else Path(folder) / label,
            resume=resume and folder is not None and (Path(folder) / label / "settings.json").exists(),
            protocols=asked.protocols,
            seeds=asked.seeds,
            statistics=statistics,
            corpus=asked.corpus if corpus is None else corpus,
            max_tokens=asked.max_tokens,
            batch_size=batch_size,
            stage=stage or (lambda what: nullcontext()),
        )
        del model
    cells = [cell for label in chosen for cell in _cells(recipe, asked, label, found[label], smoke)]
    return RecipeRun(asked, tuple(cells), found, smoke)


def smoked(recipe: PaperRecipe) -> PaperRecipe:
    """The recipe on the demo model, at its smallest: first model, two or three places on the axis, one seed."""
    values: tuple[float, ...] = ()
    if recipe.axis == "edits":
        values = tuple(float(n) for n in SMOKE_EDITS[: len(recipe.values)])
    elif recipe.values:
        values = tuple(dict.fromkeys(recipe.values[i] for i in (0, len(recipe.values) // 2, -1)))
    label = next(iter(recipe.models))
    return replace(
        recipe,
        facts="demo",
        url=None,
        format=None,
        edits=max(SMOKE_EDITS),
        seeds=recipe.seeds[:1],
        variant=None,
        corpus="demo",
        max_tokens=SMOKE_TOKENS,
        models={label: "demo"},
        values=values,
    )


def _facts(recipe: PaperRecipe, given: Sequence[Fact] | None, smoke: bool) -> list[Fact]:
    """As many as the recipe edits: of a file the first ones, as the papers take them."""
    from ..demo_loop import spread
    from ..facts.load import load_facts

    if given is None:
        if recipe.url is not None and not Path(recipe.facts).is_file():
            raise BadFile(f"recipe {recipe.name} needs {recipe.facts}; fetch {recipe.url} and give it with --facts")
        given = load_facts(recipe.facts, format=recipe.format)
        if smoke:  # a few that ask everything: consequences as well
            given = spread([fact for fact in given if fact.hops and fact.neighbours], recipe.edits)
    found = distinct(given)
    if len(found) < recipe.edits:
        raise KtError(
            f"recipe {recipe.name} edits {recipe.edits} facts, and there are {len(found)}; give more facts, or fewer "
            "edits with --limit"
        )
    return found[: recipe.edits]


def _points(recipe: PaperRecipe, smoke: bool) -> list[Point]:
    """Rows times places on the axis, for the rows that are edits."""
    found = []
    for line in recipe.rows:
        if line.method is None:
            continue
        options: dict[str, Any] = {"method": line.method, **_options(recipe, line, smoke)}
        for value in recipe.values or (None,):
            place = {} if value is None or recipe.axis == "edits" else {recipe.axis: value}
            edits = int(value) if value is not None and recipe.axis == "edits" else None
            found.append(Point(_place(value), value or 0.0, options | place, line.label, edits))
    return found


def _options(recipe: PaperRecipe, line: Line, smoke: bool) -> dict[str, Any]:
    from ..editing import METHODS

    found = dict(line.options)
    if recipe.variant is not None:
        found["variant"] = recipe.variant
    if smoke:
        found = {n: v for n, v in found.items() if not n.startswith(OF_SIZE)} | SMOKE_STEPS
        if METHODS[str(line.method)].writes_attention:
            found.setdefault("alpha", 0.3)  # a trace of three facts would take longer than the rest
    return found


def _place(value: float | None) -> str:
    return "all" if value is None else f"{value:g}"


def _cells(whole: PaperRecipe, recipe: PaperRecipe, model: str, found: Sweep, smoke: bool) -> list[Cell]:
    """In the paper's order: by place on the axis, then by row. In a smoke run the places are not the paper's, but it
    shows the figures that stand first there, so that the table has its form."""
    cells = []
    shown = f"demo, not {model}" if smoke else model
    for number, value in enumerate(recipe.values or (None,)):
        for line in whole.rows:
            row = next((r for r in found.rows if (r.series, r.label) == (line.label, _place(value))), None)
            metrics = found.before if line.unedited else {} if row is None else row.metrics
            at = value if not smoke or value is None or recipe.axis != "edits" else whole.values[number]
            cited = line.cited.get(model if at is None else f"{model}/{at:g}")
            for place, (column, metric) in enumerate(recipe.columns.items()):
                paper = None if cited is None else cited[place]
                cells.append(_cell((shown, value, line.label, column), metrics.get(metric), paper, smoke))
    return cells


def _cell(at: tuple[str, float | None, str, str], metric: Mapping[str, Any] | None, paper: Any, smoke: bool) -> Cell:
    if not metric or metric["mean"] is None:
        return Cell(*at, None, None, 0, paper, smoke)
    ends = metric["ci95"]
    ci95 = None if not ends else (100 * float(ends[0]), 100 * float(ends[1]))
    return Cell(*at, 100 * float(metric["mean"]), ci95, int(metric["n"]), paper, smoke)
