"""The user's cache folder: what follows from weights and data alone, computed once by whoever asks first."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def default_cache() -> Path:
    """`$KT_CACHE`, else `kt` in the user's cache folder."""
    if os.environ.get("KT_CACHE"):
        return Path(os.environ["KT_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "kt"


@contextmanager
def alone(lock_file: Path, doing: str) -> Iterator[None]:
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
