"""`kt run RECIPE`: a table or figure of the papers by one command, beside the papers' own figures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..artifacts import atomic_write
from ..run_folder import default_folder
from . import parse
from .command import BadOption
from .options import FigureOptions, Opt, RunOptions
from .session import load_model, screen_for, session, write_result
from .sweep import prepare_resume, take_over

if TYPE_CHECKING:
    from ..model import TracedModel
    from ..recipes import PaperRecipe


@dataclass(frozen=True)
class RecipeOptions(FigureOptions, RunOptions):
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A name (ls lists them), or a TOML file.")] = "ls"
    smoke: Annotated[
        bool, Opt("--smoke", help="The demo model and demo facts, few steps: that it runs, not the paper's figures.")
    ] = False
    model: Annotated[
        str,
        Opt("--model", "-m", help="One of the recipe's models, or with a place: qwen2.5-7b=FOLDER; or all."),
    ] = "all"
    facts: Annotated[str | None, Opt("--facts", "-f", help="A file in place of the recipe's data.")] = None
    limit: Annotated[int | None, Opt("--limit", min=1, help="Edit no more than so many facts.")] = None
    statistics: Annotated[
        Path | None, Opt("--statistics", help="A safetensors file of key second moments by module name.")
    ] = None
    corpus: Annotated[str | None, Opt("--corpus", help="Text for the key moments [default: the recipe's].")] = None
    resume: Annotated[
        Path | None, Opt("--resume", metavar="DIR", help="Go on with an interrupted run; repeat its options.")
    ] = None
    dtype: Annotated[str, Opt("--dtype", help="auto, float32/fp32, bfloat16/bf16, float16/fp16.")] = "auto"
    device: Annotated[str, Opt("--device", help="auto, cpu, cuda:0, mps.")] = "auto"
    device_map: Annotated[str | None, Opt("--device-map", help="auto shards a large model through accelerate.")] = None
    trust_remote_code: Annotated[bool, Opt("--trust-remote-code", help="Run the code that a Hub repository ships.")] = (
        False
    )


def run(options: RecipeOptions) -> None:
    """Run a recipe: a table or figure of the papers, beside the papers' own figures and the difference."""
    from ..recipes import names, read_recipe

    if options.recipe == "ls":
        known = [read_recipe(name) for name in names()]
        screen = screen_for(options)
        screen.table("kt run", ["recipe", "of", "what"], [[r.name, f"{r.paper} {r.place}", r.summary] for r in known])
        return write_result(options, {"recipes": [{"name": r.name, "about": r.summary} for r in known]})
    recipe = limited(read_recipe(options.recipe), options.limit)
    if options.smoke and (options.model != "all" or options.facts):
        raise BadOption("--smoke runs the demo model on demo facts; leave --model and --facts out")
    chosen = models_of(recipe, options.model)
    if options.resume is not None:
        if options.out not in (None, options.resume):
            raise BadOption("--resume and --out name two folders; --resume is enough")
        prepare_resume(options.resume, options.argv)
    folder = options.resume or options.out or default_folder("run", recipe.name)
    options = replace(options, out=folder)
    with session(options) as s:
        from ..facts.load import load_facts
        from ..recipes import run_recipe

        def load(name: str) -> TracedModel:
            model = load_model(replace(options, model=name))  # type: ignore[arg-type]
            s.run.describe_model(model)
            return model

        try:
            found = run_recipe(
                recipe,
                load,
                None if options.facts is None else load_facts(options.facts, format=recipe.format),
                models=chosen,
                smoke=options.smoke,
                folder=folder,
                resume=options.resume is not None,
                batch_size=parse.batch_size(options.batch_size),
                corpus=options.corpus,
                statistics=options.statistics,
                stage=s.progress,
            )
        except KeyboardInterrupt:
            s.screen.say(f"kt: interrupted; finished points are kept: go on with --resume {folder}")
            raise SystemExit(130) from None
        take_over(s, folder)
        facts = next(iter(found.sweeps.values())).about["n_facts"]
        s.run.describe_data("demo" if options.smoke else options.facts or recipe.facts, int(facts))
        atomic_write(s.run.file("table.md"), found.markdown())
        drawn = {label: each.figure() for label, each in found.sweeps.items()} if found.recipe.axis else {}
        s.keep(found.as_dict(), drawn)
        s.screen.table(f"{recipe.paper}, {recipe.place}", found.columns(), found.lines(), found.legend)
        for note in recipe.notes:
            s.screen.say(f"kt: {note}")
        if options.smoke:
            s.screen.say(f"kt: {found.legend.partition(';')[0]}")
    return None


def limited(recipe: PaperRecipe, limit: int | None) -> PaperRecipe:
    """No more than `limit` edits; of an axis of edits, the places up to it."""
    if limit is None or limit >= recipe.edits:
        return recipe
    if recipe.axis != "edits":
        return replace(recipe, edits=limit)
    values = tuple(value for value in recipe.values if value < limit)
    return replace(recipe, edits=limit, values=(*values, float(limit)))


def models_of(recipe: PaperRecipe, text: str) -> dict[str, str]:
    """`--model`: a label of the recipe, or `label=id`."""
    if text == "all":
        return dict(recipe.models)
    label, _, place = text.partition("=")
    if label not in recipe.models:
        known, one = ", ".join(recipe.models), next(iter(recipe.models))
        raise BadOption(f"--model {text!r}: the recipe has {known}; write one of them, or {one}=FOLDER")
    return {label: place or recipe.models[label]}
