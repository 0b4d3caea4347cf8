"""Locks between processes, which the operating system drops when their process dies.

`FolderLock` holds a folder by `flock` on the folder itself, so that no lock file is left in a folder that is renamed
into place. `exclusive` lets one process compute what the others wait for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import warn_user

try:
    import fcntl
except ImportError:  # Windows has no flock: leftovers of a killed process have to be removed by hand
    fcntl = None  # type: ignore[assignment]


class FolderLock:
    """A folder's lock, tried once when made and held until `release` or the end of the process.

    Attributes:
        taken: True if another process holds the lock; always False where flock is unsupported.

    Raises:
        OSError: the folder cannot be opened.
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
        """Whether this process holds the lock."""
        return self._descriptor is not None

    def release(self) -> None:
        """Give the lock back; does nothing where it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def abandoned(folder: Path) -> bool:
    """True if no process holds the folder's lock; False also where flock is unsupported."""
    lock = FolderLock(folder)
    free = lock.held
    lock.release()
    return free


def default_cache() -> Path:
    """The folder for results that follow from weights and data alone: `$KT_CACHE`, else `kt` in the user's cache."""
    if os.environ.get("KT_CACHE"):
        return Path(os.environ["KT_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "kt"


@contextmanager
def exclusive(lock_file: Path, doing: str) -> Iterator[None]:
    """Hold a lock file's lock; wait, with a warning, while another process holds it.

    Args:
        lock_file: made where it does not exist, and left there.
        doing: completes "another process ..." in the warning.

    Raises:
        OSError: no lock can be had there.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(lock_file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        warn_user(f"another process {doing}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
