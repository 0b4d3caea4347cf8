"""A stack as JSON beside its edit files, and whatever `--edit` may name: an edit file or a stack.

    {"kind": "edit-stack", "edits": [{"file": "a.safetensors", "digest": "...", "forced": false}, ...]}

Files are named relative to the JSON and lie in its folder or below: a stack moves with its folder, and reading one
cannot be led anywhere else.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..artifacts import check_writable, read_json, write_json
from ..errors import BadFile
from .edit import Edit
from .layers import Layer
from .stack import EditStack

KIND = "edit-stack"


def save_stack(stack: EditStack, path: str | Path) -> Path:
    """Write the JSON. An edit without a file in its folder is written there, named by its digest.

    Raises:
        NotWritable: with the reason.
    """
    path = Path(path)
    check_writable(path)
    entries = []
    for layer in stack.layers:
        file = None if layer.file is None else _relative(layer.file, path.parent)
        if file is None:
            file = f"{layer.digest[:16]}.safetensors"
            layer.edit.save(path.parent / file)
        entries.append({"file": file, "digest": layer.digest, "forced": layer.forced})
    return write_json(path, {"kind": KIND, "model": stack.manifest["model"], "edits": entries})


def load_stack(path: str | Path) -> EditStack:
    """Read the JSON and every edit that it names; see `EditStack.load`."""
    path = Path(path)
    try:
        held = read_json(path)
    except RecursionError:
        raise BadFile(f"{path}: not a stack (it is nested too deeply); is it the right file?") from None
    if held.get("kind") != KIND:
        raise BadFile(f"{path}: holds {held.get('kind') or 'JSON of another program'}, expected {KIND}")
    entries = held.get("edits")
    if not isinstance(entries, list):
        raise BadFile(f"{path}: 'edits' is no list; write the stack again with kt edits stack")
    stack = EditStack()
    for place, entry in enumerate(entries, start=1):
        layer = _layer(path, place, entry)
        if any(layer.digest == other.digest for other in stack.layers):
            raise BadFile(f"{path}: edit {place} is in the stack twice; write the stack again with kt edits stack")
        stack.push(layer.edit, layer.file, layer.forced)
    return stack


def open_edit(path: str | Path) -> Edit | EditStack:
    """An edit file, or a stack's JSON: both are written into a model by `applied` and `apply_`.

    Raises:
        BadFile: neither of the two, or broken.
    """
    return load_stack(path) if _is_json(Path(path)) else Edit.load(path)


def _is_json(path: Path) -> bool:
    """Safetensors begin with their header's length in eight bytes, the high ones zero; JSON is text."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise BadFile(f"cannot read {path}: {error.strerror or 'no such file'}") from error
    return head.lstrip()[:1] == b"{" and b"\0" not in head


def _layer(path: Path, place: int, entry: Any) -> Layer:
    held = entry if isinstance(entry, dict) else {}
    file, digest, forced = (held.get(name) for name in ("file", "digest", "forced"))
    if not (isinstance(file, str) and isinstance(digest, str) and isinstance(forced, bool)):
        raise BadFile(f"{path}: edit {place} needs file, digest and forced; write the stack again with kt edits stack")
    where = _inside(path, place, file)
    layer = Layer(edit := Edit.load(where), edit.digest, where, forced)
    if layer.digest != digest:
        raise BadFile(
            f"{path}: edit {place} was {digest[:12]}, but {file} now holds {layer.digest[:12]}; bring the file back, "
            "or write the stack again with kt edits stack"
        )
    return layer


def _inside(path: Path, place: int, file: str) -> Path:
    """The file that a stack names: relative, and also through links in the stack's own folder."""
    posix, windows = PurePosixPath(file), PureWindowsPath(file)
    plain = file.isprintable() and not (posix.is_absolute() or windows.anchor or ".." in windows.parts)
    if plain and (path.parent / posix).resolve().is_relative_to(path.parent.resolve()):
        return path.parent / posix
    raise BadFile(
        f"{path}: edit {place} names {file!r}, which is not in the stack's own folder; move the edit there and name it "
        "relative to the stack"
    )


def _relative(file: Path, folder: Path) -> str | None:
    """The file as seen from a folder that it lies in; None where it does not, or is gone."""
    if not file.is_file() or not file.resolve().is_relative_to(folder.resolve()):
        return None
    return file.resolve().relative_to(folder.resolve()).as_posix()
