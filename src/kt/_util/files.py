"""Atomic writes: a file is written under a temporary name in its folder and renamed when complete.

So a full disk, an exception or Ctrl-C leaves the old file or none, never an incomplete one.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from ..errors import KtError
from .kinds import as_path
from .text import visible

_REASONS = {
    errno.ENOSPC: "the disk is full; free some space or name another place",
    errno.EDQUOT: "the disk quota is used up; free some space or name another place",
    errno.EROFS: "the file system is read-only; name another place",
    errno.EACCES: "not writable; name another place or change its permissions",
    errno.EPERM: "not writable; name another place or change its permissions",
    errno.EEXIST: "a part of the path is a file, not a folder; name another place",  # mkdir's word for it
    errno.ENOTDIR: "a part of the path is a file, not a folder; name another place",
    errno.EISDIR: "that is a folder; name a file",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}


class NotWritable(KtError):
    """A file or folder that cannot be written."""

    passing = True


def why_not_written(error: OSError, path: str | os.PathLike[str] | None = None) -> NotWritable | None:
    """The one-line error for a failed write, or None if `error` has another cause."""
    if error.errno not in _REASONS:
        return None
    where = path if path is not None else error.filename
    return NotWritable(f"cannot write {'the output' if where is None else where}: {_REASONS[error.errno]}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError inside the context into a NotWritable with its reason."""
    try:
        yield
    except OSError as error:
        refusal = why_not_written(error, path) or NotWritable(f"cannot write {path}: {error.strerror or error}")
        raise refusal from error


def where_it_leads(path: str | os.PathLike[str]) -> Path:
    """The path, or what it is a link to. What is renamed to a link's own name takes the link's place, and what the link
    led to stays as it was: so whatever writes a file or folder that a user named renames to this instead.

    Raises:
        NotWritable: it, or a folder above it, is a link to what is not there.
    """
    path = as_path(path)
    with writing(path):
        for part in (path, *path.parents):
            if part.is_symlink() and not part.exists():
                it, led = "it" if part == path else part, visible(str(part.readlink()))
                raise NotWritable(f"cannot write {path}: {it} is a link to {led}, which is not there; make that first")
        # The link of a device or a pipe (/dev/stdout) leads to no name.
        return path.resolve() if path.is_symlink() and (path.is_file() or path.is_dir()) else path


def write_named(path: str | os.PathLike[str], content: bytes | str | Callable[[Path], object]) -> Path:
    """`atomic_write` of a file that a user named, which may be a link: what it leads to is written.

    Files of kt's own names, inside a folder, never lead anywhere else: there a link is replaced.
    """
    atomic_write(where_it_leads(path), content)
    return as_path(path)


def atomic_write(path: str | os.PathLike[str], content: bytes | str | Callable[[Path], object]) -> Path:
    """Write `content` to `path` atomically; a callable writes to the temporary path that it receives.

    Raises:
        NotWritable: the file cannot be written.
    """
    path = as_path(path)
    with writing(path):
        if path.exists() and not path.is_file() and not path.is_dir():
            return _write_special(path, content)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name[:100]}.tmp-{secrets.token_hex(4)}")
        try:
            _write_plain(temporary, content)
            temporary.replace(path)
            sync(path.parent)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    return path


def clear_temporaries(folder: Path, name: str = "") -> None:
    """Delete temporary files that killed writers of this file (or of any file in the folder) left behind.

    Only for a process that is the only writer there.
    """
    for path in folder.glob(f".{escape(name[:100]) or '*'}.tmp-*"):
        path.unlink(missing_ok=True)


def _write_plain(path: Path, content: bytes | str | Callable[[Path], object]) -> None:
    if callable(content):
        # The writer may replace the file by one with private permissions (safetensors does): keep the usual ones.
        path.touch()
        mode = path.stat().st_mode
        content(path)
        path.chmod(mode)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _write_special(path: Path, content: bytes | str | Callable[[Path], object]) -> Path:
    """Write into a device or a pipe directly, since renaming a file to /dev/stdout would replace the device."""
    if callable(content):
        raise NotWritable(f"cannot write {path}: it is a device or a pipe; name a file")
    with path.open("wb", buffering=0) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return path


def check_writable(path: str | os.PathLike[str], new: bool = False) -> None:
    """Check before the work that its output file can be written; `new`: that it replaces none.

    Raises:
        NotWritable: the file cannot be written, is there already, or is a link to nothing.
    """
    path = Path(path)
    real = where_it_leads(path)
    with writing(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
        if path.exists() and not path.is_file():
            return
        if path.exists() and (new or path.suffix == ".safetensors"):
            edit = "" if new else ", and may be an edit"
            raise NotWritable(f"{path} is there already{edit}; name a new file")
        folder = next(parent for parent in real.absolute().parents if parent.exists())
        probe = folder / f".kt-{secrets.token_hex(4)}"
        probe.touch(exist_ok=False)
        probe.unlink()


def sync(path: Path) -> None:
    """Flush a file or a folder to disk; Windows opens no folders."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The file's SHA-256, read in blocks."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
