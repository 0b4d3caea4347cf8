"""`kt layers`: which layers to edit in a model that no preset knows."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

from .._util.files import check_writable
from . import checks, parse
from .command import BadOption, Options, option_of
from .eval import EvalOptions
from .options import ChatOptions, FactOptions, FigureOptions, ModelOptions, Opt, RunOptions, SolveOptions
from .session import session

CHOICES = tuple(field.name for field in fields(FactOptions) if field.name not in Options.__dataclass_fields__)
"""Options that choose facts, or how they are read."""


@dataclass(frozen=True)
class LayersOptions(FigureOptions, RunOptions, FactOptions, ChatOptions, ModelOptions):
    first = ("preset_to", "edits")

    facts: Annotated[
        str,
        Opt(
            "--facts",
            "-f",
            help="Facts, of which those that the model knows are taken [default: lre].",
            show_default=False,
        ),
    ] = "default"
    method: Annotated[str, Opt("--method", help="The editing method whose layers these are.")] = "memit"
    trace: Annotated[int, Opt("--trace", min=2, help="Facts that are traced.")] = 50
    edits: Annotated[int, Opt("--edits", min=1, help="Other facts, edited in every window.")] = 10
    windows: Annotated[int, Opt("--windows", min=1, help="Windows of a module, evenly over the depth.")] = 7
    alpha: Annotated[
        str | None, Opt("--alpha", help="Attention's share in the edits [default: the preset's, else traced].")
    ] = None
    preset_to: Annotated[
        Path | None, Opt("--preset-to", help="Also write the preset here [always: preset.toml of the run folder].")
    ] = None
    statistics: Annotated[Path | None, option_of(SolveOptions, "statistics")] = None
    corpus: Annotated[str, option_of(SolveOptions, "corpus")] = SolveOptions.corpus
    max_tokens: Annotated[int | None, option_of(SolveOptions, "max_tokens")] = SolveOptions.max_tokens
    heldout: Annotated[str | None, option_of(EvalOptions, "heldout")] = None


def layers(options: LayersOptions) -> None:
    """Find layers to edit: trace facts that the model knows, edit in windows of layers, keep the best as a preset."""
    from ..editing.method_names import MethodName
    from ..editing.methods import METHODS, layered

    method = parse.one(options.method, tuple(METHODS), "--method")
    layered(method)
    alpha = parse.alpha(options.alpha)
    if isinstance(alpha, str):
        raise BadOption(f"--alpha {alpha}: write a number, or leave it out for the traced one")
    if options.preset_to is not None:
        if options.preset_to.suffix != ".toml":
            raise BadOption(f"--preset-to {options.preset_to}: name a new file that ends in .toml")
        check_writable(options.preset_to, new=True)
    shipped = unchosen(options)
    if options.facts == "default" and options.prompt is None:
        options = replace(options, facts="demo" if options.model == "demo" else "lre")
    with session(options) as s:
        from ..experiments.layer_search import find_layers

        facts = s.load_facts()
        checks.planned(options)
        model = s.load_model()
        found = find_layers(
            model,
            None if shipped else facts,
            MethodName(method),
            n_trace=options.trace,
            n_edits=options.edits,
            alpha=alpha,
            windows=options.windows,
            seed=options.seed,
            stage=s.progress,
            statistics=options.statistics,
            corpus=options.corpus,
            max_tokens=options.max_tokens,
            heldout=options.heldout,
            batch_size=parse.batch_size(options.batch_size),
        )
        found.balance.save(s.run.file("balance.json"))
        found.sweep.save(s.run.file("sweep.json"))
        for path in (s.run.file("preset.toml"), options.preset_to):
            if path is not None:
                found.save_preset(path)
        s.beside += [] if options.preset_to is None else [options.preset_to]
        s.keep(found)
        s.screen.tables(*found.tables())
        s.screen.warn(*found.notes())
        where = options.preset_to or s.path / "preset.toml"
        s.screen.say(f"kt: kept for later edits of this model where no preset speaks; or give --preset {where}")


def unchosen(options: LayersOptions) -> bool:
    """Whether nobody said which facts, or how they are read: the model's own shipped set is taken, shuffled."""
    return all(getattr(options, each.name) == each.default for each in fields(LayersOptions) if each.name in CHOICES)
