"""Output for the user: results on stdout, progress and messages on stderr."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from .._util.text import visible

if TYPE_CHECKING:
    from ..report import Table


EVERY = 10.0
"""Seconds between two lines of progress."""
NAMED = 16
"""Files of a folder that are named one by one."""
SURE, LONG = 3.0, 60.0
"""Seconds after which the pace is trusted, and of work whose length is said beforehand."""


class Progress(Protocol):
    """A callback of library functions: steps done, steps in all and (where there are stages) the stage's name."""

    def __call__(self, done: int, total: int, what: str = "") -> None: ...


class Screen:
    """Prints tables and messages as the options allow. Rich is imported with the first table, not before.

    After `hold` tables wait, with what is said behind the first of them, until `release`: files come first, so that no
    fault of stdout costs a run.
    """

    def __init__(self, quiet: bool = False, progress: bool = True, json_on_stdout: bool = False) -> None:
        self.shows_tables = not quiet and not json_on_stdout
        self.messages = not quiet
        self.progress_bars = progress and not quiet and sys.stderr.isatty()
        self.progress_lines = progress and not quiet and not self.progress_bars
        self._said = time.monotonic()
        self._waiting: list[Callable[[], None]] | None = None

    def hold(self) -> None:
        self._waiting = []

    def release(self) -> None:
        waiting, self._waiting = self._waiting or [], None
        for show in waiting:
            show()

    def tables(self, *tables: Table) -> None:
        """Print tables, but those that are for pages alone."""
        if not self.shows_tables:
            return
        from ..report.terminal import rich_table

        for table in tables:
            if table.only != "page":
                self.draw(rich_table(table))

    def draw(self, renderable: Any) -> None:
        """Print anything that rich can draw."""
        if not self.shows_tables:
            return
        if self._waiting is None:
            print_out(renderable)
        else:
            self._waiting.append(partial(print_out, renderable))

    def say(self, message: str) -> None:
        """One line for the user, on stderr."""
        if self.messages and self._waiting:
            self._waiting.append(partial(say_line, message))
        elif self.messages:
            say_line(message)

    def written(self, *paths: str | Path) -> None:
        """What a command wrote, at its end: a line for each folder with what lies in it, and one for single files."""
        given = [Path(path) for path in paths]
        for folder in filter(Path.is_dir, given):
            names = sorted(f"{each.name}/" if each.is_dir() else each.name for each in folder.iterdir())
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            self.say(f"kt: written to {folder}: {', '.join(names[:NAMED])}{more}")
        if files := [str(path) for path in given if not path.is_dir()]:
            self.say(f"kt: written to {', '.join(files)}")

    def warn(self, *lines: str) -> None:
        """Warnings of a result, in their place among its tables."""
        for line in lines:
            self.say(f"kt: warning: {line}")

    @contextmanager
    def progress(self, what: str) -> Iterator[Progress]:
        """A progress bar on stderr; where that is no terminal, a line now and then.

        Work of more than a minute is announced by one line with its length, from the pace of the first seconds.
        """
        pace, stage = Pace(), what
        if not self.progress_bars:
            yield partial(self._line, what, pace)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        text = TextColumn("{task.description}", markup=False)
        columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bars(*columns, console=console(sys.stderr), transient=True) as bars:
            task = bars.add_task(visible(what), total=None)

            def tick(done: int, total: int, what: str = "") -> None:
                bars.update(task, completed=done, total=total, description=visible(what or stage))
                if (length := pace.length(done, total)) is not None:
                    bars.console.print(f"kt: {visible(what or stage)}: {length}", markup=False, highlight=False)

            yield tick

    def _line(self, stage: str, pace: Pace, done: int, total: int, what: str = "") -> None:
        """How far a stage is, once in `EVERY` seconds, so that a long run into a file or a pipe is not silent."""
        if not self.progress_lines:
            return
        length, now = pace.length(done, total), time.monotonic()
        if length is not None:
            say_line(f"kt: {what or stage}: {length}")
        elif now - self._said >= EVERY:
            left = pace.left(done, total)
            told = "" if left is None else f", about {minutes(left)} left"
            say_line(f"kt: {what or stage}: {done:,} of {total:,}{told}")
        else:
            return
        self._said = now


class Pace:
    """How long a stage takes at the pace so far; begins anew where the number of units is another."""

    def __init__(self) -> None:
        self._total, self._before, self._start, self._told = 0, 0, time.monotonic(), False

    def left(self, done: int, total: int) -> float | None:
        """Seconds to go; None where nothing has been done since the units are counted."""
        if total != self._total:
            if self._total:
                self._before, self._start, self._told = done, time.monotonic(), False
            self._total = total
        if not self._before < done < total:
            return None
        return (time.monotonic() - self._start) * (total - done) / (done - self._before)

    def length(self, done: int, total: int) -> str | None:
        """What is said once, when `SURE` seconds have passed, of work that will take more than `LONG`."""
        left = self.left(done, total)
        taken = time.monotonic() - self._start
        if self._told or left is None or taken < SURE:
            return None
        self._told = True
        whole = taken + left
        return f"{total:,} in all, about {minutes(whole)} at the pace of the first {done:,}" if whole > LONG else None


def minutes(seconds: float) -> str:
    """`50 s`, `4 min`, `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def say_line(message: str) -> None:
    """One line on stderr; what it quotes from data cannot act on the terminal."""
    try:
        sys.stderr.write(f"{visible(message)}\n")
    except BrokenPipeError:
        discard(sys.stderr)


def print_out(renderable: Any) -> None:
    """Print text, or what rich can draw, on stdout; that nobody reads it (`| head`) is no failure."""
    try:
        if isinstance(renderable, str):
            sys.stdout.write(renderable)
            sys.stdout.flush()
        else:
            console(sys.stdout).print(renderable)
    except BrokenPipeError:
        discard(sys.stdout)


def discard(stream: TextIO) -> None:
    """Write what follows, and what Python still flushes at exit, nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def broken(stream: TextIO) -> bool:
    """Whether nobody reads the stream any more; one that cannot be written is discarded."""
    try:
        stream.flush()
    except OSError as error:
        discard(stream)
        return isinstance(error, BrokenPipeError)
    return False


def console(file: TextIO) -> Any:
    """A rich console; NO_COLOR is honoured by rich, and no colour goes into a pipe."""
    from rich.console import Console

    # A pipe has no width: without one rich would fold every table at 80 columns.
    made: Any = Console(file=file, width=None if file.isatty() else 120, highlight=False)
    made.on_broken_pipe = _tell  # rich would end the program
    return made


def _tell() -> None:
    raise BrokenPipeError


class Lines(logging.Handler):
    """Records of a logger as lines."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Say it on one line."""
        self.say(f"kt: {' '.join(record.getMessage().split())}")


@contextmanager
def one_line_warnings(say: Callable[[str], None]) -> Iterator[None]:
    """What kt tells, and its warnings, as lines on stderr; those of other libraries are not the user's business."""

    def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        say(f"kt: warning: {' '.join(str(message).split())}")

    told = logging.getLogger("kt")
    level, lines = told.level, Lines(say)
    told.addHandler(lines)
    told.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module=r"kt\b")
            warnings.showwarning = show  # type: ignore[assignment]
            yield
    finally:
        told.removeHandler(lines)
        told.setLevel(level)


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def __str__(self) -> str:
        return f"{time.perf_counter() - self._start:.1f} s"
