"""How long work reports how far it is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

Progress = Callable[[int, int], None]
"""Called with what is done and how much there is."""

Stage = Callable[[str], AbstractContextManager[Any]]
"""Opens a stage by name and gives what to report its progress to."""


def counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    """A function that is told how much more is done, and reports all that is done of `total`."""
    done = 0

    def tick(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    return tick
