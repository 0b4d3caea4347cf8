"""Callbacks that report progress, and how long what is left will take."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from inspect import signature
from typing import Any

Progress = Callable[[int, int], None]
"""Called with (units done, units in all)."""

Stage = Callable[[str], AbstractContextManager[Any]]
"""Opens a stage by name; the context's value is the stage's `Progress`."""


SURE, LONG = 3.0, 60.0
"""Seconds after which the pace is trusted, and of work whose length is said beforehand."""

_reused = 0


def reused() -> None:
    """Said before a report of work that was not done now but read back: such work tells nothing of the pace."""
    global _reused
    _reused += 1


def named(progress: Progress | None, what: str) -> Progress | None:
    """The callback with the name of a part of its work, where it takes one: kt's own do, a user's need not."""
    if progress is None or "what" not in signature(progress).parameters:
        return progress
    tell: Any = progress
    return lambda done, total: tell(done, total, what)


def counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    """A function that is told how much more is done, and reports all that is done of `total`."""
    done = 0

    def tick(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    return tick


class Pace:
    """How long a stage takes at the pace so far, without what was read back; begins anew where the number of units is
    another."""

    def __init__(self) -> None:
        self._total, self._before, self._told, self._reused = 0, 0, False, _reused
        self._start = time.monotonic()
        self._last = 0, self._start

    def left(self, done: int, total: int) -> float | None:
        """Seconds to go; None where nothing has been done since the units are counted."""
        now = time.monotonic()
        if total != self._total:
            if self._total:
                self._before, self._start, self._told, self._last = done, now, False, (done, now)
            self._total = total
        if _reused != self._reused:
            self._reused = _reused
            self._before, self._start = self._before + done - self._last[0], self._start + now - self._last[1]
        self._last = done, now
        if not self._before < done < total:
            return None
        return (now - self._start) * (total - done) / (done - self._before)

    def length(self, done: int, total: int) -> str | None:
        """What is said once, when `SURE` seconds have passed, of work that will take more than `LONG`."""
        left = self.left(done, total)
        taken = time.monotonic() - self._start
        if self._told or left is None or taken < SURE:
            return None
        self._told = True
        if (whole := taken + left) <= LONG:
            return None
        n = f"{total:,} in all" if not self._before else f"{total - self._before:,} of {total:,} to do"
        return f"{n}, about {minutes(whole)} at the pace of the first {done - self._before:,}"


def minutes(seconds: float) -> str:
    """`50 s`, `4 min`, `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
