"""A folder that is either whole or absent: filled under a temporary name beside its own, renamed when complete.

As a run folder is, but for what is in it: this one is no run, and never replaces what stands there.
"""

from __future__ import annotations

import errno
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..artifacts import NotWritable, check_writable, why_not_written, writing
from ..errors import KtError
from ..hold import Hold
from ..memory import gib
from ..run_folder import clear_leftovers, sync

FULL = ("os error 28", "No space left on device")
"""How libraries that are not Python's own say that the disk is full."""


def refuse_taken(folder: str | Path) -> None:
    """Refuse a place that holds something or cannot be written, before the work and not after.

    Raises:
        NotWritable: with the reason.
    """
    folder = Path(folder)
    with writing(folder):
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken:
        raise NotWritable(f"{folder} exists and is not empty; name a new folder")
    check_writable(folder / "config.json")


def refuse_full(folder: str | Path, needed: int) -> None:
    """Refuse to write more bytes than the disk under `folder` has left."""
    place = next(p for p in (Path(folder).absolute(), *Path(folder).absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise NotWritable(
            f"cannot write {folder}: it needs {gib(needed, 3)}, and {gib(free, 3)} of the disk are free; "
            "free some space or name another place"
        )


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Where to write: a temporary folder that gets its name at the end, its files safe on the disk by then.

    After an exception, also Ctrl-C, nothing is left of it, nor of the parents that were made for it; what a killed
    process left is taken away by the next one that writes there.

    Raises:
        NotWritable: the place is taken, or the disk is full or read-only.
    """
    refuse_taken(folder)
    final = Path(folder).absolute()
    temporary = final.with_name(f"{final.name[:100]}.tmp-{secrets.token_hex(4)}")
    made = [parent for parent in final.parents if not parent.exists()]
    hold: Hold | None = None
    try:
        with writing(Path(folder)):
            final.parent.mkdir(parents=True, exist_ok=True)
            clear_leftovers(final)
            temporary.mkdir()
            hold = Hold(temporary)
            yield temporary
            sync(temporary)
            if final.exists():
                final.rmdir()
            temporary.replace(final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        _explain(error, temporary, Path(folder))
        raise
    finally:
        if hold is not None:
            hold.release()


def _explain(error: BaseException, temporary: Path, folder: Path) -> None:
    """Say a full disk as such, whoever found it, and name the folder that the user knows."""
    if isinstance(error, KtError):
        error.args = (str(error).replace(str(temporary), str(folder)),)
    elif any(sign in str(error) for sign in FULL):
        raise why_not_written(OSError(errno.ENOSPC, ""), folder) or error from error
