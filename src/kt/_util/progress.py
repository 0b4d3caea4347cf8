"""Types of the callbacks that report progress."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

Progress = Callable[[int, int], None]
"""Called with (units done, units in all)."""

Stage = Callable[[str], AbstractContextManager[Any]]
"""Opens a stage by name; the context's value is the stage's `Progress`."""


def counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    """A function that is told how much more is done, and reports all that is done of `total`."""
    done = 0

    def tick(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    return tick
