"""Whether the process that fills a folder still lives: it holds a lock there, which the system drops when it dies."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks: what a killed process left there has to be removed by hand
    fcntl = None  # type: ignore[assignment]


class FolderLock:
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
    hold = FolderLock(folder)
    free = hold.held
    hold.release()
    return free


# The user's cache folder: what follows from weights and data alone, computed once by whoever asks first.


def default_cache() -> Path:
    """`$KT_CACHE`, else `kt` in the user's cache folder."""
    if os.environ.get("KT_CACHE"):
        return Path(os.environ["KT_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "kt"


@contextmanager
def exclusive(lock_file: Path, doing: str) -> Iterator[None]:
    """Of several processes one does this work; the others wait, and say that another one is `doing` it.

    Raises:
        OSError: no lock can be had there.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(lock_file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        warnings.warn(f"another process {doing}; waiting for it", stacklevel=4)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
