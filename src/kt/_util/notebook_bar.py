"""Progress in a notebook, where nobody asked for another: a bar below the cell, in functions that take a callback."""

from __future__ import annotations

import html
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from .progress import Pace, Progress, Stage, minutes

AFTER, EVERY = 1.0, 0.25
"""Seconds before a bar is shown, so that quick work shows none, and between two updates of it."""
OFF = "KT_NO_PROGRESS"
"""A variable of the environment that turns bars off, as the command line's --no-progress does."""

_told: ContextVar[bool] = ContextVar("told", default=False)
"""Whether something around this call reports progress: one bar is enough."""

P = ParamSpec("P")
T = TypeVar("T")


def display() -> Callable[..., Any] | None:
    """IPython's `display` in a notebook's kernel (Jupyter, Colab, VS Code), marimo's output in one of its notebooks;
    None elsewhere, or where bars are off."""
    if os.environ.get(OFF, "").lower() in ("1", "true", "yes"):
        return None
    if getattr(sys.modules.get("marimo"), "running_in_notebook", lambda: False)():
        return MarimoOutput
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if getattr(shell, "kernel", None) is None:
        return None
    from IPython.display import display as show

    return show


class MarimoOutput:
    """The output of marimo's cell that runs, with the two calls that IPython's display handles have."""

    def __init__(self, shown: Mapping[str, str], raw: bool, display_id: bool) -> None:
        self.update(shown, raw)

    def update(self, shown: Mapping[str, str], raw: bool) -> None:
        """Show this in the place of what it showed before."""
        marimo = sys.modules["marimo"]
        marimo.output.replace(marimo.Html(shown["text/html"]))


class Bar:
    """A progress callback that draws itself; `close` leaves a line with the time."""

    def __init__(self, what: str, show: Callable[..., Any]) -> None:
        self.what, self.show, self.pace = what, show, Pace()
        self.began = self.drawn = time.monotonic()
        self.handle: Any = None
        self.last = (0, 0)

    def __call__(self, done: int, total: int, what: str = "") -> None:
        now, left, self.last = time.monotonic(), self.pace.left(done, total), (done, total)
        if now - self.began < AFTER or (self.handle is not None and now - self.drawn < EVERY):
            return
        self.drawn = now
        told = "" if left is None else f", about {minutes(left)} left"
        bar = f'<progress value="{done}" max="{max(total, 1)}"></progress> '
        self._draw(f"{what or self.what}: {done:,} of {total:,}{told}", bar)

    def close(self) -> None:
        """Leave the last count and the time it took, where the bar was shown at all."""
        if self.handle is not None:
            done, total = self.last
            self._draw(f"{self.what}: {done:,} of {total:,} in {time.monotonic() - self.began:.0f} s")

    def _draw(self, text: str, bar: str = "") -> None:
        shown = {"text/plain": text, "text/html": f"{bar}<small>{html.escape(text)}</small>"}
        if self.handle is None:
            self.handle = self.show(shown, raw=True, display_id=True)
        else:
            self.handle.update(shown, raw=True)


@contextmanager
def notebook_stage(what: str) -> Iterator[Progress | None]:
    """A stage with a bar in a notebook; elsewhere, or inside work that reports progress itself, None."""
    show = None if _told.get() else display()
    if show is None:
        yield None
        return
    bar, before = Bar(what, show), _told.set(True)
    try:
        yield bar
    finally:
        _told.reset(before)
        bar.close()


def stage_or_bars(stage: Stage | None) -> Stage:
    """The stage that was given, else one with bars in a notebook."""
    return notebook_stage if stage is None else stage


def with_bar(what: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A function whose `progress` is a bar in a notebook where its caller gives none."""

    def around(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> T:
            if kwargs.get("progress") is None:
                with notebook_stage(what) as tick:
                    return function(*args, **(kwargs if tick is None else {**kwargs, "progress": tick}))  # type: ignore[arg-type]
            before = _told.set(True)
            try:
                return function(*args, **kwargs)
            finally:
                _told.reset(before)

        return called

    return around
