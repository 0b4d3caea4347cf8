"""`kt probe`: two answers through the layers, and what an edit leaves of the old one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ..runs.folder import FILES
from . import parse
from .command import BadOption
from .options import ChatOptions, FactOptions, FigureOptions, ForceOptions, ModelOptions, Opt, RunOptions
from .session import Session, open_edit, reading, session

STATISTICS = ("mean", "median")


@dataclass(frozen=True)
class ProbeOptions(RunOptions, FigureOptions, ForceOptions, FactOptions, ChatOptions, ModelOptions):
    first = ("edit", "prompt", "subject", "answer", "foil")

    edit: Annotated[
        Path | None,
        Opt("--edit", help="An edit (of kt apply-edit): probe before and after, and score what is left."),
    ] = None
    pool: Annotated[
        str | None,
        Opt("--pool", help="With --edit: more facts of the same relations or templates, as rivals of the old answer."),
    ] = None
    raw: Annotated[bool, Opt("--raw", help="Read states without the model's final norm, as JEEP's text writes it.")] = (
        False
    )
    layers: Annotated[str | None, Opt("--layers", help="Only these layers: 0-5, 3 (no stages then).")] = None
    sets: Annotated[str | None, Opt("--sets", help="Word sets: demo, or a JSON file.")] = None
    whole: Annotated[bool, Opt("--whole", help="Also all tokens of both answers: log p, and the worst rank.")] = False
    statistic: Annotated[str, Opt("--statistic", help="What figures and tables show: mean or median.")] = "mean"


def probe(options: ProbeOptions) -> None:
    """The contrast probe: rank and probability of the old and the new answer, layer by layer."""
    parse.one(options.statistic, STATISTICS, "--statistic")
    layers = parse.layers(options.layers, "--layers")
    if layers == ():
        raise BadOption("--layers none: there is nothing to probe; name layers, as 0-5")
    if options.edit is None and options.pool is not None:
        raise BadOption("--pool has rivals for what an edit left; it has no place without --edit")
    if options.edit is None:
        return probe_model(options, layers)
    for flag, given in (("--layers", layers), ("--sets", options.sets), ("--whole", options.whole or None)):
        if given is not None:
            raise BadOption(f"{flag} has no place with --edit, which compares all layers; leave one of them out")
    return probe_edit(options)


def probe_model(options: ProbeOptions, layers: tuple[int, ...] | None) -> None:
    """One model: curves, stages, word sets."""
    rows: Any = parse.batch_size(options.batch_size)
    with session(options) as s:
        sets = word_sets(options.sets)
        facts, model = s.load_facts(), s.load_model()
        from ..probing import contrast_probe

        with s.progress("probing") as tick:
            result = contrast_probe(
                model,
                facts,
                not options.raw,
                layers=layers,
                sets=sets,
                batch_size=rows,
                progress=tick,
                whole=options.whole,
                seed=options.seed,
            )
        result.save(s.run.file(FILES["probe"]))
        s.keep(result, result.figures(options.statistic))
        s.screen.tables(*result.tables(options.statistic))


def probe_edit(options: ProbeOptions) -> None:
    """A model before and after an edit, and the residual score."""
    rows: Any = parse.batch_size(options.batch_size)
    with session(options) as s:
        assert options.edit is not None
        pool = [] if options.prompt is not None else s.load_facts()  # wrong files are refused before a model loads
        if options.pool is not None:
            from ..facts.load import read_facts

            pool = [*pool, *read_facts(options.pool, **reading(options)).facts]
        edit = open_edit(s, options.edit)
        facts, model = edited_facts(s, edit), s.load_model()
        from ..residual import residual_fact

        with s.progress("probing before and after the edit") as tick:
            residual = residual_fact(
                model,
                edit,
                facts,
                pool=pool,
                final_norm=not options.raw,
                batch_size=rows,
                seed=options.seed,
                progress=tick,
            )
        residual.save(s.run.file(FILES["residual"]))
        s.keep(residual, **{**residual.after.as_dict(), "before": residual.before.as_dict(), **residual.as_dict()})
        s.screen.tables(*residual.tables())


def edited_facts(s: Session, edit: Any) -> Any:
    """The facts that the options name, or those of the edit's own requests among them."""
    facts = s.load_facts()
    requests = {(r["prompt"], r["subject"]) for r in edit.requests}
    edited = [fact for fact in facts if (fact.template, fact.subject) in requests]
    if edited and len(edited) < len(facts):
        s.screen.say(f"kt: probing the {len(edited)} facts that the edit was asked for, of {len(facts)} given")
    return edited or facts


def word_sets(named: str | None) -> Any:
    """The sets, read before the model loads."""
    if named is None:
        return None
    from ..probing.word_sets import open_sets

    return open_sets(named)
