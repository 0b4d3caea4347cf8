"""`kt run RECIPE`: a table or figure of the papers by one command, beside the papers' own figures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._util.files import atomic_write
from .._util.text import words
from ..errors import KtError
from . import checks, interrupt, parse
from .command import BadOption, option_of
from .options import FigureOptions, LongRunOptions, ModelOptions, Opt, RunOptions, SolveOptions
from .session import Session, load_model, screen_for, session, write_result
from .sweep import points_folder, take_over

if TYPE_CHECKING:
    from ..model.model import TracedModel
    from ..recipes import PaperRecipe, RecipeRun


@dataclass(frozen=True)
class RecipeOptions(FigureOptions, RunOptions):
    first = ("smoke", "only", "resume")

    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A name (ls lists them), or a TOML file.")] = "ls"
    smoke: Annotated[
        bool, Opt("--smoke", help="The demo model and demo facts, few steps: that it runs, not the paper's figures.")
    ] = False
    model: Annotated[
        str,
        Opt("--model", "-m", help="One of the recipe's models, or with a place: qwen2.5-7b=FOLDER; or all."),
    ] = "all"
    facts: Annotated[str | None, Opt("--facts", "-f", help="A file in place of the recipe's data.")] = None
    limit: Annotated[int | None, Opt("--limit", min=1, help="Take no more than so many facts.")] = None
    seed: Annotated[int | None, Opt("--seed", min=0, help="In place of the recipe's seeds.")] = None  # type: ignore[assignment]
    statistics: Annotated[Path | None, option_of(SolveOptions, "statistics")] = None
    corpus: Annotated[str | None, Opt("--corpus", help="Text for the key moments [default: the recipe's].")] = None
    only: Annotated[str | None, Opt("--only", metavar="METHOD,...", help="Of a table of methods these rows alone.")] = (
        None
    )
    sets: Annotated[Path | None, Opt("--sets", help="A JSON file of word sets in place of the recipe's.")] = None
    resume: Annotated[Path | None, option_of(LongRunOptions, "resume")] = None
    dtype: Annotated[str, option_of(ModelOptions, "dtype")] = ModelOptions.dtype
    device: Annotated[str, option_of(ModelOptions, "device")] = ModelOptions.device
    device_map: Annotated[str | None, Opt("--device-map", help="auto shards a large model through accelerate.")] = None
    trust_remote_code: Annotated[bool, option_of(ModelOptions, "trust_remote_code")] = False


def run(options: RecipeOptions) -> None:
    """Run a recipe: a table or figure of the papers, beside what the papers have."""
    from ..recipes import read_recipe

    if options.recipe == "ls":
        return list_recipes(options)
    recipe = read_recipe(options.recipe).limited(options.limit).seeded(options.seed)
    if options.smoke and (options.model != "all" or options.facts or options.limit):
        raise BadOption("--smoke runs the demo model on a few demo facts; leave --model, --facts and --limit out")
    chosen, taken = models_of(recipe, options.model), checked(recipe, options)
    folder = points_folder(options, recipe.name)
    options = replace(options, out=folder)
    with session(options) as s:
        s.run.manifest["seed"] = recipe.seeds[0] if len(recipe.seeds) == 1 else [*recipe.seeds]
        result = _run(s, recipe, options, chosen, taken)
        take_over(s, folder)
        s.run.describe_data("demo" if options.smoke else options.facts or recipe.facts, result.n_facts)
        atomic_write(s.run.file("table.md"), result.markdown())
        result.save(s.run.folder)
        s.keep(result)
        show(s, result)
    return None


def list_recipes(options: RecipeOptions) -> None:
    """`kt run ls`."""
    checks.idle(options)
    from ..recipes import names, read_recipe
    from ..report import Table

    known = [read_recipe(name) for name in names()]
    rows = [[r.name, r.kind, f"{r.paper} {r.place}", r.summary] for r in known]
    screen_for(options).tables(Table(["recipe", "kind", "of", "what"], rows, "kt run"))
    write_result(options, {"recipes": [{"name": r.name, "kind": r.kind, "about": r.summary} for r in known]})


def _run(
    s: Session, recipe: PaperRecipe, options: RecipeOptions, models: dict[str, str], taken: dict[str, Any]
) -> RecipeRun:
    from ..facts.load import load_facts
    from ..recipes import run_recipe

    def load(name: str) -> TracedModel:
        model = load_model(replace(options, model=name))  # type: ignore[arg-type]
        s.run.describe_model(model)
        return model

    folder = s.path
    if options.resume is None:
        s.run.make_room()  # points are kept under the run's own name
    try:
        return run_recipe(
            recipe,
            load,
            None if options.facts is None else load_facts(options.facts, format=recipe.format),
            models=models,
            smoke=options.smoke,
            folder=folder,
            batch_size=parse.batch_size(options.batch_size),
            stage=s.progress,
            **taken,
        )
    except KeyboardInterrupt:
        if any(folder.rglob("settings.json")):
            interrupt.note(f"finished points are kept: go on with --resume {folder}")
        raise
    except KtError as error:
        if options.resume is None and any(folder.rglob("settings.json")):
            error.args = (f"{error}; {s.kept()}",)
        raise


def checked(recipe: PaperRecipe, options: RecipeOptions) -> dict[str, Any]:
    """The options that only some kinds of recipes take, refused now where this one does not."""
    from ..recipes.base import refuse_untaken
    from ..recipes.methods import MethodsRecipe

    only = None if options.only is None else words(options.only)
    taken = {"corpus": options.corpus, "statistics": options.statistics, "sets": options.sets, "only": only}
    refuse_untaken(recipe, resume=options.resume, **taken)
    if only is not None and isinstance(recipe, MethodsRecipe):
        recipe.named(only)  # refused now where there is no such row
    return {**taken, "resume": options.resume is not None}


def show(s: Session, result: RecipeRun) -> None:
    """The tables, then what to read them with."""
    from ..recipes.result import SMOKE

    s.screen.tables(*result.tables())
    for note in result.recipe.notes:
        s.screen.say(f"kt: {note}")
    if result.smoke:
        s.screen.say(f"kt: {SMOKE}")


def models_of(recipe: PaperRecipe, text: str) -> dict[str, str]:
    """`--model`: a label of the recipe, or `label=id`."""
    if text == "all":
        return dict(recipe.models)
    label, _, place = text.partition("=")
    if label not in recipe.models:
        known, one = ", ".join(recipe.models), next(iter(recipe.models))
        raise BadOption(f"--model {text!r}: the recipe has {known}; write one of them, or {one}=FOLDER")
    return {label: place or recipe.models[label]}
