"""Types of the callbacks that report progress."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from inspect import signature
from typing import Any

Progress = Callable[[int, int], None]
"""Called with (units done, units in all)."""

Stage = Callable[[str], AbstractContextManager[Any]]
"""Opens a stage by name; the context's value is the stage's `Progress`."""


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
