"""`kt report` and `kt explore`: one page from run folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from .._util.files import check_writable
from .command import BadOption, Options
from .demo import REPORT_FILE
from .options import Opt
from .session import write_result


@dataclass(frozen=True)
class ReportOptions(Options):
    runs: Annotated[list[Path] | None, typer.Argument(metavar="RUN...", help="Run folders that kt wrote.")] = None
    out: Annotated[Path, Opt("--out", "-o", help="The page to write.")] = Path(REPORT_FILE)
    overwrite: Annotated[bool, Opt("--overwrite", help="Replace a page that stands at --out.")] = False


@dataclass(frozen=True)
class ExploreOptions(ReportOptions):
    out: Annotated[Path, Opt("--out", "-o", help="The page to write.")] = Path("explore.html")


def report(options: ReportOptions) -> None:
    """One HTML page from one or more run folders: the verdict, the fact explorer, every result with its figures."""
    write(options, "report")


def explore(options: ExploreOptions) -> None:
    """The fact explorer as one HTML page: every fact of the runs, its maps, answers by layer and texts."""
    write(options, "explore")


def write(options: ReportOptions, what: str) -> None:
    """Check what was typed, then write the page."""
    from ..runs.folder import read_run

    if not options.runs:
        raise BadOption(f"kt {what} needs run folders: kt {what} runs/NAME ... --out {what}.html")
    check_writable(options.out, new=not options.overwrite)
    for folder in options.runs:
        read_run(folder)
    from ..explorer import explore, write_report

    path = write_report(options.runs, options.out) if what == "report" else explore(options.runs).save(options.out)
    write_result(options, {what: str(path)}, path)
