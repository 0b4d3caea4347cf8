"""Files that are either whole or absent: atomic writes, JSON, arrays with their metadata.

Everything is written under a temporary name in the folder where it will stay and renamed when complete, so that a
full disk, an exception or Ctrl-C leaves the old file or none, never half a one. Run folders: see run_folder.py.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import BadFile, KtError
from .files import _REASONS, NotWritable, atomic_write
from .text import visible_lines

SCHEMA_VERSION = 1


@contextmanager
def complete_file(path: str | os.PathLike[str], what: str, remedy: str) -> Iterator[None]:
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
