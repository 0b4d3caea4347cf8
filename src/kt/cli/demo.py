"""`kt demo` and `kt report`: the whole loop, and the page that shows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..runs.folder import FILES
from .apply_edit import show_edit
from .console import Clock
from .eval import show_scores
from .heatmap import show_balance
from .options import FactOptions, ModelOptions, Opt, RunOptions
from .probe import show_residual, show_stages
from .session import results_of_balance, results_of_edit, results_of_probe, results_of_trace, session

if TYPE_CHECKING:
    from ..demo.loop import Loop


REPORT_FILE = "report.html"


@dataclass(frozen=True)
class DemoOptions(RunOptions, FactOptions, ModelOptions):
    n_trace: Annotated[int, Opt("--n-trace", min=1, help="Facts that are traced.")] = 24
    n_edits: Annotated[int, Opt("--n-edits", min=1, help="Facts that are edited, together.")] = 10
    samples: Annotated[int, Opt("--samples", min=1, help="Noise draws per fact.")] = 10


def demo(options: DemoOptions) -> None:
    """The whole loop on the embedded model: trace, balance, probe, joint edit, judge, one HTML report."""
    clock = Clock()
    with session(options) as s:
        facts, model = s.load_facts(), s.load_model()
        from ..demo.loop import run_loop
        from ..report.run_report import write_report

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
