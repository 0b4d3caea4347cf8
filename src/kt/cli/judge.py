"""`kt eval`: how well an edit holds, reaches further, and leaves the rest alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..run_folder import FILES
from . import parse
from .console import interval
from .options import FactOptions, ModelOptions, Opt, RunOptions
from .session import Session, session

if TYPE_CHECKING:
    from ..evaluation import Scores


@dataclass(frozen=True)
class EvalOptions(RunOptions, FactOptions, ModelOptions):
    edit: Annotated[Path | None, Opt("--edit", help="Score the model with this edit (of kt apply-edit) in it.")] = None
    no_generate: Annotated[bool, Opt("--no-generate", help="Leave out what needs generated text: faster.")] = False
    no_control: Annotated[
        bool, Opt("--no-control", help="Do not also score a joint edit's MLP part alone, which takes as long again.")
    ] = False


def evaluate(options: EvalOptions) -> None:
    """Score a model, or a model with an edit, on a facts file."""
    with session(options) as s:
        from ..editing import Edit
        from ..evaluation import evaluate

        edit = Edit.load(options.edit) if options.edit else None
        facts, model = s.load_facts(), s.load_model()
        rows: dict[str, Any] = {
            "generate": not options.no_generate,
            "batch_size": parse.batch_size(options.batch_size),
            "seed": options.seed,
        }
        with s.progress("unedited model") as tick:
            before = evaluate(model, facts, progress=tick, **rows)
        if edit is None:
            before.save(s.run.file(FILES["after"]))
            s.keep(before.as_dict())
            return show_scores(s, before)
        control = None if options.no_control else edit.control()
        found: dict[str, Scores] = {}
        for name, part in (("after", edit), ("control", control)):
            if part is not None:
                with s.progress(f"{name} the edit" if name == "after" else "its control") as tick, part.applied(model):
                    found[name] = evaluate(model, facts, before=before, progress=tick, **rows)
                found[name].save(s.run.file(FILES[name]))
        before.save(s.run.file(FILES["before"]))
        metrics = {name: scores.as_dict()["metrics"] for name, scores in {"before": before, **found}.items()}
        s.keep(found["after"].as_dict() | {n: m for n, m in metrics.items() if n != "after"})
        show_scores(s, found["after"], before, found.get("control"))
    return None


def show_scores(s: Session, after: Scores, before: Scores | None = None, control: Scores | None = None) -> None:
    """One row a metric; the unedited model's figure beside it, and that of a joint edit's control."""
    beside = [("before", before), ("after", after), ("MLP alone", control)]
    columns = [name for name, scores in beside if scores is not None] if before is not None else ["mean [95%]"]
    title = f"{after.model}: {len(after.records)} records"
    note = "MLP alone: the joint edit's MLP part by itself, x (1 - α)" if control is not None else None
    s.screen.table(title, ["metric", *columns, "n"], score_rows(after, before, control), note)


def score_rows(after: Scores, before: Scores | None = None, control: Scores | None = None) -> list[list[Any]]:
    """Cells of the table of scores."""
    rows: list[list[Any]] = []
    for name, metric in after.metrics.items():
        old = [] if before is None else [_cell(before.metrics.get(name))]
        held = [] if control is None else [_cell(control.metrics.get(name))]
        rows.append([name, *old, _cell(metric), *held, metric.n])
    return rows


def _cell(metric: Any) -> str:
    return "–" if metric is None else interval(metric.mean, metric.ci95)
