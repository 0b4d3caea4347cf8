"""What the user sees: results on stdout, progress and messages on stderr."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

from .._util.text import cell, visible, visible_lines


class Progress(Protocol):
    """What library functions report to: how much is done, of how much, and (where there are stages) of what."""

    def __call__(self, done: int, total: int, what: str = "") -> None: ...


class Screen:
    """Prints tables and messages as the options allow. Rich is imported with the first table, not before."""

    def __init__(self, quiet: bool = False, progress: bool = True, json_on_stdout: bool = False) -> None:
        self.tables = not quiet and not json_on_stdout
        self.messages = not quiet
        self.progress_bars = progress and not quiet and sys.stderr.isatty()

    def table(self, title: str, columns: list[str], rows: list[list[Any]], caption: str | None = None) -> None:
        """Print one table; numbers are set to the right."""
        if not self.tables:
            return
        from rich.table import Table
        from rich.text import Text

        # As `Text`, in which rich reads no mark-up: names of models and texts of facts stand in titles too.
        above = Text(visible(title), style="table.title")
        below = None if caption is None else Text(visible_lines(caption), style="table.caption")
        table = Table(title=above, title_justify="left", caption=below, caption_justify="left")
        for i, column in enumerate(columns):
            numeric = all(isinstance(row[i], int | float | None) for row in rows)
            table.add_column(Text(visible(column)), justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell(value)) for value in row))
        self.show(table)

    def show(self, renderable: Any) -> None:
        """Print anything that rich can draw."""
        if self.tables:
            console(sys.stdout).print(renderable)

    def say(self, message: str) -> None:
        """One line for the user, on stderr."""
        if self.messages:
            say_line(message)

    @contextmanager
    def progress(self, what: str) -> Iterator[Progress]:
        """A progress bar on stderr, when it is a terminal."""
        if not self.progress_bars:
            yield lambda done, total, what="": None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        text = TextColumn("{task.description}", markup=False)
        columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bars(*columns, console=console(sys.stderr), transient=True) as bars:
            task = bars.add_task(visible(what), total=None)
            yield lambda done, total, what="": bars.update(task, completed=done, total=total)


def say_line(message: str) -> None:
    """One line on stderr; what it quotes from data cannot act on the terminal."""
    sys.stderr.write(f"{visible(message)}\n")


def console(file: TextIO) -> Any:
    """A rich console; NO_COLOR is honoured by rich, and no colour goes into a pipe."""
    from rich.console import Console

    # A pipe has no width: without one rich would fold every table at 80 columns.
    return Console(file=file, width=None if file.isatty() else 120, highlight=False)


@contextmanager
def one_line_warnings(say: Callable[[str], None]) -> Iterator[None]:
    """Warnings of kt as one line on stderr; those of other libraries are not the user's business."""

    def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        say(f"kt: warning: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"kt\b")
        warnings.showwarning = show  # type: ignore[assignment]
        yield


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def __str__(self) -> str:
        return f"{time.perf_counter() - self._start:.1f} s"
