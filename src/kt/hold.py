"""Whether the process that fills a folder still lives: it holds a lock there, which the system drops when it dies."""

from __future__ import annotations

import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks: what a killed process left there has to be removed by hand
    fcntl = None  # type: ignore[assignment]


class Hold:
    """A folder's lock, until `release` or the end of the process.

    `taken`: somebody else has it. Where the system or the file system knows no such locks, nobody ever has.
    """

    def __init__(self, folder: Path) -> None:
        self.taken = False
        self._descriptor: int | None = None
        if fcntl is None:
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._descriptor = descriptor
        except OSError as error:
            os.close(descriptor)
            self.taken = isinstance(error, BlockingIOError)

    @property
    def held(self) -> bool:
        """Whether the lock is ours."""
        return self._descriptor is not None

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def abandoned(folder: Path) -> bool:
    """Whether nobody holds the folder any more; False where that cannot be known."""
    hold = Hold(folder)
    free = hold.held
    hold.release()
    return free
