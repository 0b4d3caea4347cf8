"""`kt probe`: two answers through the layers, and what an edit leaves of the old one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from .._util.text import interval
from ..runs.folder import FILES
from . import parse
from .command import BadOption
from .options import FactOptions, FigureOptions, ForceOptions, ModelOptions, Opt, RunOptions
from .session import Session, open_edit, results_of_probe, session

if TYPE_CHECKING:
    from ..probing import Probe, Stages
    from ..residual import Residual


STATISTICS = ("mean", "median")


@dataclass(frozen=True)
class ProbeOptions(RunOptions, FigureOptions, ForceOptions, FactOptions, ModelOptions):
    edit: Annotated[
        Path | None,
        Opt("--edit", help="An edit (of kt apply-edit): probe before and after, and score what is left."),
    ] = None
    raw: Annotated[bool, Opt("--raw", help="Read states without the model's final norm, as JEEP's text writes it.")] = (
        False
    )
    layers: Annotated[str | None, Opt("--layers", help="Only these layers: 0-5, 3 (no stages then).")] = None
    sets: Annotated[str | None, Opt("--sets", help="Word sets: demo, or a JSON file.")] = None
    statistic: Annotated[str, Opt("--statistic", help="What figures and tables show: mean or median.")] = "mean"


def probe(options: ProbeOptions) -> None:
    """The contrast probe: rank and probability of the old and the new answer, layer by layer."""
    parse.one(options.statistic, STATISTICS, "--statistic")
    layers = parse.layers(options.layers, "--layers")
    if layers == ():
        raise BadOption("--layers none: there is nothing to probe; name layers, as 0-5")
    if options.edit is None:
        return probe_model(options, layers)
    for flag, given in (("--layers", layers), ("--sets", options.sets)):
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
            found = contrast_probe(
                model, facts, not options.raw, layers=layers, sets=sets, batch_size=rows, progress=tick
            )
        found.save(s.run.file(FILES["probe"]))
        s.keep(results_of_probe(found), probe_figures(found, options.statistic))
        show_probe(s, found, options.statistic)


def probe_edit(options: ProbeOptions) -> None:
    """A model before and after an edit, and the residual score."""
    rows: Any = parse.batch_size(options.batch_size)
    with session(options) as s:
        assert options.edit is not None
        s.load_facts()  # a wrong file is refused before a model loads
        edit = open_edit(s, options.edit)
        facts, model = edited_facts(s, edit), s.load_model()
        from ..residual import residual_fact

        pool = None if options.prompt is not None else s.load_facts()
        with s.progress("probing before and after the edit") as tick:
            found = residual_fact(
                model,
                edit,
                facts,
                pool=pool,
                final_norm=not options.raw,
                batch_size=rows,
                seed=options.seed,
                progress=tick,
            )
        found.save(s.run.file(FILES["residual"]))
        results = results_of_probe(found.after) | {"before": results_of_probe(found.before), **found.as_dict()}
        s.keep(results, residual_figures(found))
        show_residual(s, found)


def edited_facts(s: Session, edit: Any) -> Any:
    """The facts that the options name, or those of the edit's own requests among them."""
    facts = s.load_facts()
    asked = {(r["prompt"], r["subject"]) for r in edit.requests}
    own = [fact for fact in facts if (fact.template, fact.subject) in asked]
    if own and len(own) < len(facts):
        s.screen.say(f"kt: probing the {len(own)} facts that the edit was asked for, of {len(facts)} given")
    return own or facts


def word_sets(named: str | None) -> Any:
    """The sets, read before the model loads."""
    if named is None:
        return None
    from ..probing.word_sets import open_sets

    return open_sets(named)


def probe_figures(found: Probe, statistic: str) -> dict[str, Any]:
    """Figure 2 of the residual stream, then of each module, then the word sets."""
    figures = {
        "residual-stream": found.figure("resid", statistic),
        "attention": found.figure("attn", statistic),
        "mlp": found.figure("mlp", statistic),
    }
    return figures | ({"word-sets": found.sets_figure()} if found.set_names else {})


def residual_figures(found: Residual) -> dict[str, Any]:
    """Before and after, at both positions."""
    return {"before-after": found.figure("prediction"), "before-after-subject": found.figure("subject_last")}


def show_probe(s: Session, found: Probe, statistic: str) -> None:
    """The residual stream by layer, then the stages."""
    short = {"subject_last": "subject", "prediction": "prediction"}
    columns, rows = ["layer"], [[str(layer)] for layer in found.layers]
    for position in found.positions:
        for answer in found.answers:
            columns.append(f"{short[position]}: {answer} rank, prob")
            rank, prob = (found.curve("resid", position, answer, m, statistic).mean for m in ("rank", "prob"))
            for row, r, p in zip(rows, rank, prob, strict=True):
                row.append(f"{r:.1f}  {p:.3f}")
    title = f"residual stream of {found.metadata['model']}, {statistic}s over {int(found.counted.sum())} facts"
    note = "rank 0 is the top" + ("" if found.metadata["final_norm"] else "; read without the final norm")
    s.screen.table(title, columns, rows, f"{note}; {found.why_left_out()}")
    show_stages(s, found.stages)


def show_stages(s: Session, stages: Stages) -> None:
    """Each stage with its layers and gain, or why there is none."""
    rows = []
    for stage in (stages.enrichment, stages.extraction, stages.promotion):
        layers = ", ".join(map(str, stage.layers)) or "none"
        rows.append([stage.name, layers, stage.reason or interval(stage.gain.mean, stage.gain.ci95)])
    for name in ("layers_low", "layers_high"):
        proposed = getattr(stages, name)
        rows.append([name, "none" if proposed is None else ", ".join(map(str, proposed)), "proposed for JEEP"])
    s.screen.table("stages of recall (JEEP, section 4.1)", ["stage", "layers", "gain [95%]"], rows)


def show_residual(s: Session, found: Residual) -> None:
    """The score, where it sits, and whether the old answer comes back."""
    from ..residual.show import attack_lines

    rows = []
    for kind, places in found.by_kind.items():
        for place, left in places.items():
            score = interval(left.score.mean, left.score.ci95)
            seen = [] if place == "both" else [_share(found, kind, place, state) for state in ("before", "after")]
            rows.append([kind, place, score, left.before.mean, left.after.mean, *(seen or ["", ""])])
    columns = ["kind", "position", "residual [95%]", "advantage before", "after", "in a top ten before", "after"]
    note = f"n = {found.score.n}; {found.why_left_out()}"
    s.screen.table("what is left of the old answer", columns, rows, note)
    said = [(name, getattr(found, name)) for name in ("score", "floor", "above_floor")]
    names = {"score": "residual score", "floor": "of what was never learnt", "above_floor": "difference"}
    s.screen.table("residual", ["", "[95%]"], [[names[n], interval(x.mean, x.ci95)] for n, x in said])
    lines = []
    for line in attack_lines(found):
        excess, lead = (interval(x.mean, x.ci95) for x in (line.excess, line.lead))
        lines.append([line.attack, line.old.mean, line.third.mean, excess, line.lead_before.mean, lead])
    columns = ["prompt", "old", "third, named alike", "old - third", "lead before", "lead after"]
    note = "old, third: share of facts on which it beats the new answer; lead: ln P(old)/P(third)"
    s.screen.table("is the old answer more probable than the new one?", columns, lines, note)


def _share(found: Residual, kind: str, place: str, state: str) -> str:
    return f"{found.in_top[kind][place][state]['original'].mean:.2f}"
