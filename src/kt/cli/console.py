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

from .._util.progress import Pace, minutes
from .._util.text import some_of, visible

if TYPE_CHECKING:
    from ..report import Table


EVERY = 10.0
"""Seconds between two lines of progress."""
NAMED = 16
"""Files of a folder that are named one by one."""


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
            self.say(f"kt: written to {folder}: {some_of(names, NAMED)}")
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
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bars

        text, left = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[left]}", markup=False)
        columns = (text, BarColumn(), MofNCompleteColumn(), left)  # rich's own estimate counts what was kept as done
        with Bars(*columns, console=console(sys.stderr), transient=True) as bars:
            task = bars.add_task(visible(what), total=None, left="")

            def tick(done: int, total: int, what: str = "") -> None:
                length, left = pace.length(done, total), pace.left(done, total)
                told = "" if left is None else f"about {minutes(left)} left"
                bars.update(task, completed=done, total=total, description=visible(what or stage), left=told)
                if length is not None:
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
