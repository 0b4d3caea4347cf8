"""`kt demo`: the whole loop, and the page that shows it."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..errors import FailedCheck
from ..runs.folder import FILES
from .heatmap import show_balance
from .options import FactOptions, ModelOptions, Opt, RunOptions
from .session import session

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
    start = time.perf_counter()
    with session(options) as s:
        facts, model = s.load_facts(), s.load_model()
        from ..demo.loop import run_loop
        from ..evaluation.scores import Comparison
        from ..explorer import write_report
        from ..runs.report import Run

        warnings.simplefilter("ignore", FailedCheck)  # said behind the edit's tables
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
        s.run.results = results_of_loop(loop, s.path)
        about = s.run.manifest | {"command_line": ["kt", *options.argv]}
        write_report([Run(s.path, about, s.run.folder)], s.run.file(REPORT_FILE), title="kt demo")
        show_balance(s, loop.balance)
        s.screen.tables(loop.probe.stages_table())
        s.screen.say(f"kt: {loop.settings}")
        s.screen.tables(*loop.edit.tables())
        s.screen.warn(*(loop.edit.verdict.warnings if loop.edit.verdict else ()))
        scores = Comparison(loop.before, loop.after, loop.control)
        s.screen.tables(*scores.tables(), *loop.residual.tables())
    s.screen.say(f"kt: done in {time.perf_counter() - start:.1f} s; open {s.path / REPORT_FILE}")


def results_of_loop(loop: Loop, folder: Path) -> dict[str, object]:
    """The figures of every stage, and where the report lies."""
    return {
        "alpha": loop.balance.alpha,
        "settings": loop.settings,
        "before": loop.before.as_dict()["metrics"],
        "after": loop.after.as_dict()["metrics"],
        "control": None if loop.control is None else loop.control.as_dict()["metrics"],
        "protocol": loop.after.protocol,
        "report": str(folder / REPORT_FILE),
        "heatmap": loop.trace.as_dict(),
        "balance": loop.balance.as_dict(),
        "probe": loop.probe.as_dict(),
        "residual": loop.residual.as_dict(),
        "edit": loop.edit.as_dict() | {"edit": str(folder / FILES["edit"])},
    }
