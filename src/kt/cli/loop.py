"""`kt demo` and `kt report`: the whole loop, and the page that shows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..run_folder import FILES
from .command import BadOption, Options
from .console import Clock
from .edit import show_edit
from .judge import show_scores
from .options import FactOptions, ModelOptions, Opt, RunOptions
from .probe import show_residual, show_stages
from .results import results_of_balance, results_of_edit, results_of_probe, results_of_trace
from .session import screen_for, session, write_result
from .trace import show_balance

if TYPE_CHECKING:
    from ..demo_loop import Loop

REPORT_FILE = "report.html"


@dataclass(frozen=True)
class DemoOptions(RunOptions, FactOptions, ModelOptions):
    n_trace: Annotated[int, Opt("--n-trace", min=1, help="Facts that are traced.")] = 24
    n_edits: Annotated[int, Opt("--n-edits", min=1, help="Facts that are edited, together.")] = 10
    samples: Annotated[int, Opt("--samples", min=1, help="Noise draws per fact.")] = 10


@dataclass(frozen=True)
class ReportOptions(Options):
    runs: Annotated[list[Path] | None, typer.Argument(metavar="RUN...", help="Run folders that kt wrote.")] = None
    out: Annotated[Path, Opt("--out", "-o", help="The page to write.")] = Path(REPORT_FILE)


def demo(options: DemoOptions) -> None:
    """The whole loop on the embedded model: trace, balance, probe, joint edit, judge, one HTML report."""
    clock = Clock()
    with session(options) as s:
        facts, model = s.load_facts(), s.load_model()
        from ..demo_loop import run_loop
        from ..run_report import write_report

        loop = run_loop(
            model,
            facts,
            n_trace=options.n_trace,
            n_edits=options.n_edits,
            samples=options.samples,
            seed=options.seed,
            stage=s.progress,
        )
        loop.save(s.run.folder)
        s.keep(results_of_loop(loop, s.path))
        write_report([s.run.folder], s.run.file(REPORT_FILE), title=f"kt demo: {model.name}")
        show_balance(s, loop.balance, per_fact=False)
        show_stages(s, loop.probe.stages)
        show_edit(s, loop.edit)
        show_scores(s, loop.after, loop.before, loop.control)
        show_residual(s, loop.residual)
    s.screen.say(f"kt: done in {clock}; open {s.path / REPORT_FILE}")


def results_of_loop(loop: Loop, folder: Path) -> dict[str, object]:
    """The figures of every stage, and where the report lies."""
    return {
        "alpha": loop.balance.alpha,
        "before": loop.before.as_dict()["metrics"],
        "after": loop.after.as_dict()["metrics"],
        "control": None if loop.control is None else loop.control.as_dict()["metrics"],
        "protocol": loop.after.protocol,
        "report": str(folder / REPORT_FILE),
        "heatmap": results_of_trace(loop.trace),
        "balance": results_of_balance(loop.balance),
        "probe": results_of_probe(loop.probe),
        "residual": loop.residual.as_dict(),
        "edit": results_of_edit(loop.edit, str(folder / FILES["edit"])),
    }


def report(options: ReportOptions) -> None:
    """One HTML page from the files of one or more run folders."""
    from ..run_folder import read_run
    from ..run_report import write_report

    if not options.runs:
        raise BadOption("kt report needs run folders: kt report runs/NAME ... --out report.html")
    for folder in options.runs:
        read_run(folder)
    path = write_report(options.runs, options.out, title="kt report")
    screen_for(options).say(f"kt: written to {path}")
    write_result(options, {"report": str(path)})
