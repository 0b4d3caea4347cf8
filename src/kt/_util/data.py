"""JSON files, and arrays with metadata in safetensors files; all are written atomically (files.py)."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import BadFile, KtError, said_by
from .files import _REASONS, NotWritable, atomic_write
from .kinds import as_path
from .text import visible_lines

SCHEMA_VERSION = 1
JSON_BYTES = 1 << 30


def unreadable(path: str | os.PathLike[str], error: OSError | UnicodeDecodeError) -> BadFile:
    """The error of a file that cannot be opened or is no text."""
    reason = (error.strerror or "no such file") if isinstance(error, OSError) else "not a text file"
    return BadFile(f"cannot read {path}: {reason}; check the path")


@contextmanager
def complete_file(path: str | os.PathLike[str], what: str, remedy: str) -> Iterator[None]:
    """Turn errors from parsing a file's content (a missing part, a wrong type) into one BadFile with a remedy.

    Raises:
        BadFile: `path` is not a complete `what`.
    """
    try:
        yield
    except KtError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {said_by(error, 200)}"
        raise BadFile(f"{path}: not a whole {what} ({reason}); {remedy}") from error


def plain(value: Any) -> Any:
    """Convert a value to JSON types: numpy arrays and dataclasses are unwrapped, NaN and infinities become None."""
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
    """JSON, sorted and indented, so that equal results are equal bytes; control characters are escaped."""
    text = json.dumps(plain(value), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return visible_lines(text) + "\n"  # escapes the control characters that JSON allows and a terminal would obey


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> Path:
    """Write a JSON object with the schema version, which its readers check."""
    return atomic_write(path, to_json({"schema_version": SCHEMA_VERSION, **value}))


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        BadFile: the file cannot be read, or is not a JSON object; the message names the line.
    """
    try:
        with as_path(path).open("rb") as file:
            raw = file.read(JSON_BYTES + 1)
        if len(raw) > JSON_BYTES:
            raise BadFile(f"{path}: has more than {JSON_BYTES:,} bytes, more than kt writes; is it the right file?")
        value = json.loads(raw.decode())
    except json.JSONDecodeError as error:
        raise BadFile(f"{path}: not JSON (line {error.lineno}: {error.msg}); is it the right file?") from error
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path}: nested too deeply, or a number too long, for JSON; is it the right file?") from error
    if not isinstance(value, dict):
        raise BadFile(f"{path}: expected a JSON object, found a {type(value).__name__}; is it the right file?")
    return value


TOML_BYTES, TOML_DEPTH = 256 << 10, 32
"""The most bytes of a TOML file, and the most names in one key or brackets in each other: the parser takes the square
of a key's names, and calls itself for each bracket."""
QUOTED = re.compile(
    r'"""(?:[^\\]|\\.)*?(?:"""|\Z)|"(?:[^"\\\n]|\\.)*"?'
    r"|'''.*?(?:'''|\Z)|'[^'\n]*'?|#[^\n]*",
    re.DOTALL,
)
"""A text or a comment of a TOML file."""


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        BadFile: the file cannot be read, is no TOML, or is larger or more deeply nested than any settings are.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        with path.open("rb") as file:
            raw = file.read(TOML_BYTES + 1)
        if len(raw) > TOML_BYTES:
            raise BadFile(f"{path}: has more than {TOML_BYTES:,} bytes, too many for settings; is it the right file?")
        text = raw.decode()
        if _toml_depth(text) > TOML_DEPTH:
            raise BadFile(f"{path}: a key or value is nested more than {TOML_DEPTH} deep; is it the right file?")
        return tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a ValueError
        raise BadFile(f"{path}: not TOML ({said_by(error)}); write name = value lines") from error


def _toml_depth(text: str) -> int:
    """The most names in a key, or brackets in each other, of a TOML text."""
    bare = QUOTED.sub("", text)
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", bare):
        depth = depth + 1 if bracket in "[{" else max(depth - 1, 0)
        deepest = max(deepest, depth)
    return max(deepest, *(piece.count(".") for piece in re.split(r"[=,\[\]{}\n]", bare)))


def read_table(path: Path) -> dict[str, Any]:
    """Read a TOML file, or a JSON object from a file whose name ends in .json.

    Raises:
        BadFile: the file cannot be read, or is neither.
    """
    return read_json(path) if path.suffix == ".json" else read_toml(path)


def header_text(metadata: Mapping[str, Any]) -> str:
    """The header text that `save_arrays` writes for the metadata; equal metadata give equal text."""
    return json.dumps(plain({"schema_version": SCHEMA_VERSION, **metadata}), sort_keys=True)


def save_arrays(
    path: str | os.PathLike[str], arrays: Mapping[str, Any], metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write arrays (numpy or torch) as safetensors, with the metadata as JSON in the header.

    The metadata are under one key, since safetensors writes several keys in an order that changes between runs.

    Raises:
        NotWritable: the file cannot be written.
    """
    header = {"kt": header_text(metadata or {})}
    tensors = any(hasattr(array, "detach") for array in arrays.values())

    def write(temporary: Path) -> None:
        if tensors:
            import torch
            from safetensors.torch import save_file as save_tensors

            contiguous = {name: torch.as_tensor(a).detach().cpu().contiguous() for name, a in arrays.items()}
            save_tensors(contiguous, temporary, metadata=header)
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
    """Read the arrays (numpy, or torch with `framework="pt"`) and the metadata that `save_arrays` wrote.

    Raises:
        BadFile: the file is incomplete, or its metadata's `kind` is not `kind` (unless that is None).
    """
    arrays, header = read_arrays(path, framework)
    metadata = _parsed(path, header)
    if kind is not None and metadata.get("kind") != kind:
        held = metadata.get("kind") or "tensors of another program"
        raise BadFile(f"{path}: holds {held}, expected {kind}; is it the right file?")
    return arrays, metadata


def read_arrays(path: str | os.PathLike[str], framework: str = "numpy") -> tuple[dict[str, Any], str]:
    """The arrays of a safetensors file, and the text of kt's metadata (`{}` if another program wrote the file).

    Raises:
        BadFile: the file is missing, incomplete, or not safetensors.
    """
    with open_arrays(path, framework) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, _metadata_text(path, file)  # noqa: SIM118


def read_metadata(path: str | os.PathLike[str]) -> tuple[list[str], dict[str, Any]]:
    """The arrays' names and kt's metadata, from the header alone.

    Raises:
        BadFile: as `read_arrays`, or the metadata are no JSON object.
    """
    with open_arrays(path, "pt") as file:
        return list(file.keys()), _parsed(path, _metadata_text(path, file))


LONGEST_HEADER = 100_000_000
"""Of safetensors; the library reads none that is longer."""
PAGE = (None, "an HTML page, not data; fetch the file again from its own address")
SERVERS_ANSWER = "a server's message, not data; fetch the file again, logged in if it is gated"
DISGUISES = {
    b"version https://git-lfs": (None, "a Git LFS pointer, not the data; fetch the file itself (git lfs pull)"),
    b"<?xml": (None, "XML, not data that kt reads; fetch the file again, or save it as JSON or CSV"),
    b"<!doctype": PAGE,
    b"<html": PAGE,
    b"404: not found": (None, SERVERS_ANSWER),
    b"not found": (None, SERVERS_ANSWER),
    b"entry not found": (None, SERVERS_ANSWER),
    b"access denied": (None, SERVERS_ANSWER),
    b"\xff\xfe": (None, "UTF-16 text; save it as UTF-8"),
    b"\xfe\xff": (None, "UTF-16 text; save it as UTF-8"),
    b"\x1f\x8b": (".gz", "compressed with gzip; let its name end in .gz"),
    b"\x28\xb5\x2f\xfd": (".zst", "compressed with Zstandard; let its name end in .zst"),
    b"par1": (".parquet", "Parquet; let its name end in .parquet"),
    b"pk\x03\x04": (None, "a zip archive or a spreadsheet; unpack it, or save it as CSV"),
    b"bzh": (None, "compressed with bzip2; unpack it"),
    b"\xfd7zxz": (None, "compressed with xz; unpack it"),
}
"""How files begin (in lower case) that are something else than their name says, and the ending that would be right."""


def disguise(start: bytes) -> str | None:
    """What a file that begins so is in truth, where it can be no safetensors."""
    begins = start.lstrip().lower()
    return next((what for magic, (_, what) in DISGUISES.items() if begins.startswith(magic)), None)


def tensor_header(path: str | os.PathLike[str], remedy: str = "write it again") -> dict[str, Any]:
    """The header of a safetensors file, for whose tensors the file is long enough; nothing large is imported.

    Raises:
        BadFile: it is missing, not safetensors, or cut short.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
            length = int.from_bytes(start[:8], "little")
            file.seek(8)
            text = file.read(length) if 0 < length <= min(LONGEST_HEADER, size) else b""
    except OSError as error:
        raise unreadable(path, error) from error
    # A header's length, too, can look like the beginning of another format.
    if not text.startswith(b"{") and (what := disguise(start)) is not None:
        raise BadFile(f"{path} is {what}")
    with complete_file(path, "safetensors file", remedy):
        header = json.loads(text) if text else None
        if not isinstance(header, dict):
            raise ValueError("no header" if size else "empty")
        ends = [about["data_offsets"][1] for name, about in header.items() if name != "__metadata__"]
        if 8 + length + max(ends, default=0) > size:
            raise ValueError(f"{8 + length + max(ends) - size:,} bytes are missing at its end")
    return header


@contextmanager
def open_arrays(path: str | os.PathLike[str], framework: str = "pt") -> Iterator[Any]:
    """An open safetensors file.

    Raises:
        BadFile: the file is missing, incomplete, or not safetensors, also where reading a tensor shows it.
    """
    from safetensors import SafetensorError, safe_open

    if not as_path(path).is_file():
        reason = "it is a folder" if Path(path).is_dir() else "no such file"
        raise BadFile(f"cannot read {path}: {reason}; check the path")
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except KtError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    except (SafetensorError, ValueError, TypeError, AttributeError, RuntimeError) as error:  # types numpy or torch lack
        raise BadFile(f"{path}: not a whole safetensors file ({said_by(error)}); write it again") from error


MOST_VALUES = 5_000_000
"""Of kt's metadata in one file; those of an edit of 20,000 facts have a million."""


def _metadata_text(path: str | os.PathLike[str], file: Any) -> str:
    text = (file.metadata() or {}).get("kt", "{}")
    if text.count(",") > MOST_VALUES:
        raise BadFile(f"{path}: its metadata hold more than {MOST_VALUES:,} values; is it the right file?")
    return text


def _parsed(path: str | os.PathLike[str], text: str) -> dict[str, Any]:
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path}: not a whole safetensors file ({said_by(error)}); write it again") from error
    if not isinstance(metadata, dict):
        raise BadFile(f"{path}: its metadata is a {type(metadata).__name__}, not an object; write it again")
    return metadata
