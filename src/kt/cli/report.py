"""`kt report`: one page from run folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from .._util.files import check_writable
from .command import BadOption, Options
from .demo import REPORT_FILE
from .options import Opt
from .session import screen_for, write_result


@dataclass(frozen=True)
class ReportOptions(Options):
    runs: Annotated[list[Path] | None, typer.Argument(metavar="RUN...", help="Run folders that kt wrote.")] = None
    out: Annotated[Path, Opt("--out", "-o", help="The page to write.")] = Path(REPORT_FILE)
    overwrite: Annotated[bool, Opt("--overwrite", help="Replace a page that stands at --out.")] = False


def report(options: ReportOptions) -> None:
    """One HTML page from the files of one or more run folders."""
    from ..runs.folder import read_run
    from ..runs.report import write_report

    if not options.runs:
        raise BadOption("kt report needs run folders: kt report runs/NAME ... --out report.html")
    check_writable(options.out, new=not options.overwrite)
    for folder in options.runs:
        read_run(folder)
    path = write_report(options.runs, options.out, title="kt report")
    screen_for(options).say(f"kt: written to {path}")
    write_result(options, {"report": str(path)})
