"""`kt eval`: how well an edit holds, reaches further, and leaves the rest alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
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
        scores = before
        if edit is not None:
            with s.progress("edited model") as tick, ExitStack() as stack:
                stack.enter_context(edit.applied(model))
                scores = evaluate(model, facts, before=before, progress=tick, **rows)
            before.save(s.run.file(FILES["before"]))
        scores.save(s.run.file(FILES["after"]))
        s.keep(scores.as_dict() | ({"before": before.as_dict()["metrics"]} if edit is not None else {}))
        show_scores(s, scores, before if edit is not None else None)


def show_scores(s: Session, after: Scores, before: Scores | None = None) -> None:
    """One row a metric; the unedited model's figure beside it."""
    columns = ["metric", "before", "after", "n"] if before is not None else ["metric", "mean [95%]", "n"]
    s.screen.table(f"{after.model}: {len(after.records)} records", columns, score_rows(after, before))


def score_rows(after: Scores, before: Scores | None = None) -> list[list[Any]]:
    """Cells of the table of scores."""
    rows: list[list[Any]] = []
    for name, metric in after.metrics.items():
        middle: Sequence[str] = () if before is None else [_cell(before.metrics.get(name))]
        rows.append([name, *middle, _cell(metric), metric.n])
    return rows


def _cell(metric: Any) -> str:
    return "–" if metric is None else interval(metric.mean, metric.ci95)
