"""Files that are either whole or absent: atomic writes, JSON, arrays with their metadata.

Everything is written under a temporary name in the folder where it will stay and renamed when complete, so that a
full disk, an exception or Ctrl-C leaves the old file or none, never half a one. Run folders: see run_folder.py.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

from .errors import BadFile, KtError
from .visible import visible_lines

SCHEMA_VERSION = 1

_REASONS = {
    errno.ENOSPC: "the disk is full; free some space or name another place",
    errno.EDQUOT: "the disk quota is used up; free some space or name another place",
    errno.EROFS: "the file system is read-only; name another place",
    errno.EACCES: "not writable; name another place or change its permissions",
    errno.EPERM: "not writable; name another place or change its permissions",
    errno.ENOTDIR: "a part of the path is a file, not a folder; name another place",
    errno.EISDIR: "that is a folder; name a file",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}


class NotWritable(KtError):
    """A file or folder that cannot be written."""


def why_not_written(error: OSError, path: str | os.PathLike[str] | None = None) -> NotWritable | None:
    """The one-line error for a failed write, or None when `error` is of another nature."""
    if error.errno not in _REASONS:
        return None
    where = path if path is not None else error.filename
    return NotWritable(f"cannot write {'the output' if where is None else where}: {_REASONS[error.errno]}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write into the one line that says why."""
    try:
        yield
    except OSError as error:
        refusal = why_not_written(error, path) or NotWritable(f"cannot write {path}: {error.strerror or error}")
        raise refusal from error


def atomic_write(path: str | os.PathLike[str], content: bytes | str | Callable[[Path], object]) -> Path:
    """Write `content` (or let it write the temporary path it is given) and rename it into place."""
    path = Path(path)
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
            _sync_folder(path.parent)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    return path


def clear_temporaries(folder: Path, name: str = "") -> None:
    """Take away what killed writers of this file (or of any in the folder) left; for whoever writes there alone."""
    for left in folder.glob(f".{escape(name[:100]) or '*'}.tmp-*"):
        left.unlink(missing_ok=True)


def _write_plain(path: Path, content: bytes | str | Callable[[Path], object]) -> None:
    if callable(content):
        # The writer may put a private file of its own here (safetensors does): keep the usual permissions.
        path.touch()
        mode = path.stat().st_mode
        content(path)
        path.chmod(mode)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _write_special(path: Path, content: bytes | str | Callable[[Path], object]) -> Path:
    """A device or a pipe is written through: renaming over /dev/stdout would replace the device itself."""
    if callable(content):
        raise NotWritable(f"cannot write {path}: it is a device or a pipe; name a file")
    with path.open("wb", buffering=0) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return path


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a file that cannot be written before the work that it is to hold, not after.

    Raises:
        NotWritable: with the reason.
    """
    path = Path(path)
    with writing(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
        if path.exists() and not path.is_file():
            return
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        probe = folder / f".kt-{secrets.token_hex(4)}"
        probe.touch(exist_ok=False)
        probe.unlink()


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole(path: str | os.PathLike[str], what: str, remedy: str) -> Iterator[None]:
    """Around the taking apart of a file's content: what a part that is missing or of a wrong kind raises, as one line.

    Raises:
        BadFile: `path` is not a whole `what`; the reason and the remedy.
    """
    try:
        yield
    except KtError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = f"{type(error).__name__}: {_one_line(error)[:200]}"
        raise BadFile(f"{path}: not a whole {what} ({reason}); {remedy}") from error


# JSON


def plain(value: Any) -> Any:
    """`value` as JSON knows it: numpy and dataclasses unwrapped, NaN and infinities as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "as_dict"):
        return plain(value.as_dict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return str(value)


def to_json(value: Any) -> str:
    """Sorted and indented, so that equal results are equal bytes; shown by a terminal, no text in it acts there."""
    text = json.dumps(plain(value), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return visible_lines(text) + "\n"  # JSON's own escapes, of what it lets stand


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> Path:
    """Write a JSON object, with the schema version that its readers check."""
    return atomic_write(path, to_json({"schema_version": SCHEMA_VERSION, **value}))


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object from a file; a broken one is a BadFile that names the line."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise BadFile(f"{path}: not JSON (line {error.lineno}: {error.msg}); is it the right file?") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadFile(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not a text file'}") from error
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path}: nested too deeply, or a number too long, for JSON; is it the right file?") from error
    if not isinstance(value, dict):
        raise BadFile(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


# Arrays


def header_text(metadata: Mapping[str, Any]) -> str:
    """The metadata as `save_arrays` writes it into the header: equal metadata, equal text."""
    return json.dumps(plain({"schema_version": SCHEMA_VERSION, **metadata}), sort_keys=True)


def save_arrays(
    path: str | os.PathLike[str], arrays: Mapping[str, Any], metadata: Mapping[str, Any] | None = None
) -> Path:
    """Arrays (numpy or torch) as safetensors, the metadata as JSON in the header.

    The metadata sits under one key: safetensors writes several keys in an order that changes between runs.
    """
    header = {"kt": header_text(metadata or {})}
    tensors = any(hasattr(array, "detach") for array in arrays.values())

    def write(temporary: Path) -> None:
        if tensors:
            import torch
            from safetensors.torch import save_file as save_tensors

            whole = {name: torch.as_tensor(a).detach().cpu().contiguous() for name, a in arrays.items()}
            save_tensors(whole, temporary, metadata=header)
        else:
            import numpy as np
            from safetensors.numpy import save_file

            save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, temporary, metadata=header)

    from safetensors import SafetensorError

    try:
        return atomic_write(path, write)
    except SafetensorError as error:
        full = "os error 28" in str(error) or "No space left" in str(error)
        reason = _REASONS[errno.ENOSPC] if full else str(error)
        raise NotWritable(f"cannot write {path}: {reason}") from error


def load_arrays(
    path: str | os.PathLike[str], kind: str | None = None, framework: str = "numpy"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays (as numpy, or torch with `framework="pt"`) and the metadata that `save_arrays` wrote.

    With `kind`, the metadata's `kind` must say the same: a trace is not an edit, though both are safetensors.
    """
    arrays, header = read_arrays(path, framework)
    try:
        metadata = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path}: not a whole safetensors file ({_one_line(error)}); write it again") from error
    if not isinstance(metadata, dict):
        raise BadFile(f"{path}: its metadata is a {type(metadata).__name__}, not an object; write it again")
    if kind is not None and metadata.get("kind") != kind:
        raise BadFile(f"{path}: holds {metadata.get('kind') or 'tensors of another program'}, expected {kind}")
    return arrays, metadata


def read_arrays(path: str | os.PathLike[str], framework: str = "numpy") -> tuple[dict[str, Any], str]:
    """The arrays of a safetensors file, and the text of kt's metadata (`{}` where another program wrote it).

    Raises:
        BadFile: not there, cut short, or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework=framework) as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, AttributeError) as error:  # the last two: a type numpy lacks
        raise BadFile(f"{path}: not a whole safetensors file ({_one_line(error)}); write it again") from error
    except OSError as error:
        raise BadFile(f"cannot read {path}: {error.strerror or 'no such file'}") from error
    return arrays, header.get("kt", "{}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The file's SHA-256, read in blocks."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
