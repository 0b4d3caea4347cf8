"""Whether a file is an edit or a stack of edits, by its first bytes; nothing here imports torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .._util.data import read_json, tensor_header, unreadable
from ..errors import BadFile

EDIT, STACK = "edit", "edit-stack"
"""The kinds that the two files name in their metadata."""
KINDS = (EDIT, "context", "adapter")
"""Kinds of an edit's file: updates of weights, or an effect on prompts or on values."""
MAKE = "give the edit.safetensors of a kt apply-edit run"


def header_kind(path: Path) -> Any:
    """The kind that kt's metadata names, from the header of a safetensors file alone.

    Raises:
        BadFile: the header cannot be read, or the file is cut short.
        ValueError, AttributeError, RecursionError: the metadata are not kt's.
    """
    metadata = tensor_header(path).get("__metadata__") or {}
    return json.loads(metadata.get("kt", "{}")).get("kind")


def is_json(path: Path) -> bool:
    """Safetensors begin with their header's length in eight bytes, the high ones zero; JSON is text."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise unreadable(path, error) from error
    return head.lstrip()[:1] == b"{" and b"\0" not in head


def other_format(path: Path) -> str | None:
    """The format of a file that is not safetensors, in words, by its first bytes; None if unknown."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError:
        return None
    if not start:
        return "an empty file"
    if start[4:9] == b"\0\0\0\0{":  # safetensors: the upper half of the header's length, and the header
        return None
    formats = {
        b"{": "JSON or text",
        b"[": "JSON or text",
        b"PK": "a zip archive (a checkpoint of torch? kt opens no pickle)",
        b"\x80": "a pickle, which kt does not open",
    }
    return next((words for first, words in formats.items() if start.lstrip().startswith(first)), None)


def refuse_other(path: Path) -> None:
    """Refuse a file that is no edit and no stack, as far as its first bytes and its metadata tell.

    Raises:
        BadFile: it is another program's, or another file of kt.
    """
    if is_json(path):
        try:
            kind = read_json(path).get("kind")
        except BadFile:
            kind = None
        if kind != STACK:
            raise BadFile(f"{path}: is {f'{kind} of kt' if kind else 'JSON or text'}, expected edit; {MAKE}")
    elif other := other_format(path):
        raise BadFile(f"{path}: is {other}, expected edit; {MAKE}")
    else:
        try:
            kind = header_kind(path)
        except (ValueError, AttributeError, RecursionError):
            return  # broken: whoever opens it says where
        if kind not in KINDS:
            raise not_an_edit(path, kind)


def not_an_edit(path: str | Path, kind: Any) -> BadFile:
    """The refusal of a safetensors file of another kind."""
    content = f"a {kind[:40]} of kt" if isinstance(kind, str) else "tensors of another program"
    return BadFile(f"{path}: holds {content}, expected edit; {MAKE}")
