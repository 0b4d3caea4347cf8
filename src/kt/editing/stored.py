"""Which edits and stacks lie in a folder, broken ones with the reason."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..errors import BadFile
from . import stack_file
from .edit import Edit
from .edit_file import KIND
from .stack import EditStack

LONGEST_HEADER = 100_000_000
"""Bytes; safetensors' own limit."""
LARGEST_STACK = 1_000_000


@dataclass(frozen=True)
class Stored:
    """A file that holds an edit or a stack, or should. `error`: why it cannot be opened; then nothing else is known.

    `size` is in bytes (of a stack, with its edits' files), `modified` in UTC to the second.
    """

    path: Path
    kind: str
    size: int
    modified: str
    method: str | None = None
    requests: int | None = None
    alpha: float | None = None
    weights: int | None = None
    model: str | None = None
    digest: str | None = None
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return vars(self) | {"path": str(self.path)}


def stored(places: Sequence[str | Path] = (".",)) -> list[Stored]:
    """Every edit file and stack in these folders and below, and among these files, in the order of their paths.

    Other programs' files, and kt's own of other kinds, are passed over; hidden ones too.

    Raises:
        BadFile: a place that is not there.
    """
    found: dict[Path, Stored] = {}
    for place in map(Path, places):
        if not place.exists():
            raise BadFile(f"{place}: no such file or folder; name one that holds edits")
        for path in sorted(_files(place)):
            kind = _kind(path)
            if kind is not None and path not in found:
                found[path] = _read(path, kind)
    return list(found.values())


def _files(place: Path) -> Iterator[Path]:
    if place.is_file():
        yield place
    for folder, inner, names in os.walk(place):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if name.endswith((".safetensors", ".json")) and not name.startswith(".") and path.is_file():
                yield path


def _kind(path: Path) -> str | None:
    """`edit` or `stack`; `edit` too where a safetensors file is too broken to say what it is."""
    try:
        if path.suffix == ".json":
            small = path.stat().st_size <= LARGEST_STACK
            return "stack" if small and f'"{stack_file.KIND}"'.encode() in path.read_bytes() else None
        return "edit" if _header_kind(path) == KIND else None
    except (OSError, ValueError, AttributeError, RecursionError):
        return "edit"


def _header_kind(path: Path) -> Any:
    """What kt's metadata calls the file; its header alone is read, and the tensors after it may be missing."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= LONGEST_HEADER else b""
    metadata = json.loads(header).get("__metadata__", {})
    return json.loads(metadata.get("kt", "{}")).get("kind")


def _read(path: Path, kind: str) -> Stored:
    about = path.stat()
    modified = datetime.fromtimestamp(about.st_mtime, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    try:
        found: Edit | EditStack = Edit.load(path) if kind == "edit" else EditStack.load(path)
    except BadFile as error:
        return Stored(path, kind, about.st_size, modified, error=str(error).removeprefix(f"{path}: "))
    files = [e.file for e in found.layers if e.file] if isinstance(found, EditStack) else []
    return Stored(
        path,
        kind,
        about.st_size + sum(file.stat().st_size for file in files),
        modified,
        found.manifest.get("method"),
        len(found.requests),
        found.alpha,
        len(found.names),
        found.manifest.get("model"),
        found.digest if isinstance(found, Edit) else None,
    )
