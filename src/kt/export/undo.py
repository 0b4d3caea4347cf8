"""Remove an edit from the folder into which it was merged, and restore the exact original bytes.

A weight's fingerprint tells its state: `base` (before the edit), `applied` (with the edit), or `other`. The original
bytes come from `kt/undo.safetensors` in the folder, or from the base model, and are used only if their fingerprints are
those of the weights before the edit.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from .._util.data import load_arrays, read_json
from ..errors import BadFile, KtError, UnknownModel, WorkFailed
from ..model.update import fingerprint_of
from ..report import Shown, Table
from .hf import ABOUT, EDIT, OWN, UNDO
from .shards import Shards, whole_folder

if TYPE_CHECKING:
    from ..editing import Edit
    from ..model.model import TracedModel


class Fingerprints(NamedTuple):
    """Fingerprints by weight, before the edit and with it."""

    before: Mapping[str, str]
    after: Mapping[str, str]

    def state(self, name: str, tensor: Tensor) -> str:
        """`base`, `applied` or `other`."""
        value = fingerprint_of([(name, tensor)])
        return "base" if value == self.before[name] else "applied" if value == self.after.get(name) else "other"


@dataclass(frozen=True)
class Reverted(Shown):
    """The reverted folder: the previous state of each weight, and the fingerprint of the whole model at `path`."""

    path: Path
    restored: bool
    already: bool
    fingerprint: str
    weights: dict[str, str]

    kind = "revert"

    @property
    def metadata(self) -> dict[str, Any]:
        """The folder and the model's fingerprint."""
        return {"path": str(self.path), "fingerprint": self.fingerprint}

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return vars(self) | {"path": str(self.path)}

    def tables(self) -> Sequence[Table]:
        """What each weight was and is."""
        words = {"base": "as before the edit", "applied": "with the edit"}
        rows = [[name, words[state], "as before the edit"] for name, state in self.weights.items()]
        return [Table(["weight", "was", "is"], rows, f"weights of {self.path}")]


def revert_folder(
    folder: str | Path,
    edit: Edit | str | Path | None = None,
    base: TracedModel | str | None = None,
    to: str | Path | None = None,
) -> Reverted:
    """Restore the original bytes in a folder of merged weights, and verify the result.

    In place, each file is replaced atomically. After an interruption between two files every weight is either in its
    state before the edit or with it, and a second call finishes the work.

    Args:
        edit: the edit to remove; by default the one in the folder.
        base: the original model, by name or loaded; by default the bytes in the folder's `kt/undo.safetensors`.
        to: write a new folder, atomically, and leave the first one unchanged.

    Raises:
        KtError: there is no edit or no original bytes, or a weight is neither as before the edit nor as with it.
        BadFile: the folder or a file in it is broken or of another edit.
        NotWritable: the disk is full or read-only, or `to` is not empty.
        WorkFailed: the written weights do not have their original fingerprints.
    """
    folder = Path(folder)
    shards = Shards.open(folder)
    edit = _edit(folder, edit)
    fingerprints = known_fingerprints(folder, edit)
    states = {name: fingerprints.state(name, shards.read(name)) for name in edit.names}
    _refuse_other(folder, states)
    edited = [name for name, state in states.items() if state == "applied"]
    originals = _originals(folder, shards, edit, edited, base, fingerprints) if edited else {}
    with ExitStack() as stack:
        target = folder
        if to is not None:
            target = stack.enter_context(whole_folder(to))
            _copy_rest(folder, target, {shards.files[name] for name in edited})
        for file in sorted({shards.files[name] for name in edited}):
            shards.write(file, {n: t for n, t in originals.items() if shards.files[n] == file}, target)
        fingerprint = _verify(target, edit, fingerprints)
    return Reverted(Path(to or folder), True, not edited, fingerprint, states)


def _edit(folder: Path, edit: Edit | str | Path | None) -> Edit:
    from ..editing import Edit

    if isinstance(edit, Edit):
        return edit
    if edit is None and not (folder / OWN / EDIT).is_file():
        raise KtError(f"{folder} carries no edit ({OWN}/{EDIT}); name the edit file that was merged with --edit")
    return Edit.load(edit or folder / OWN / EDIT)


def known_fingerprints(folder: Path, edit: Edit) -> Fingerprints:
    """From the folder's record if it is of this edit (its dtype may not be the one of solving), else from the edit."""
    record: Mapping[str, Any] = edit.manifest
    if (folder / OWN / ABOUT).is_file():
        about = read_json(folder / OWN / ABOUT)
        if about.get("edit") == edit.digest:
            record = about
        elif (folder / OWN / EDIT).is_file():
            raise KtError(f"{folder} was written with another edit than the one named; leave out --edit")
    fingerprints = Fingerprints(*(record.get(key) or {} for key in ("fingerprints", "fingerprints_after")))
    if not all(isinstance(part, Mapping) for part in fingerprints) or not all(
        isinstance(fingerprints.before.get(name), str) for name in edit.names
    ):
        raise BadFile(f"{folder}: no fingerprints from before the edit are known; export the edit again")
    return fingerprints


def _refuse_other(folder: Path, states: Mapping[str, str]) -> None:
    other = [name for name, state in states.items() if state == "other"]
    if other:
        shown = ", ".join(other[:3]) + (", ..." if len(other) > 3 else "")
        raise KtError(
            f"{folder}: {len(other)} of {len(states)} weights are neither as before the edit nor as with it ({shown}); "
            "they were changed since, or are of another model or dtype; nothing was written"
        )


def _originals(
    folder: Path,
    shards: Shards,
    edit: Edit,
    names: list[str],
    base: TracedModel | str | None,
    fingerprints: Fingerprints,
) -> dict[str, Tensor]:
    """The original weights, verified by their fingerprints."""
    if base is not None:
        source = "the base model"
        if isinstance(base, str):
            from ..model.load import load

            base = load(base, dtype=shards.read(names[0]).dtype, device="cpu")
        originals = {name: base.own(name).detach().cpu() for name in names}
    elif (folder / OWN / UNDO).is_file():
        source = f"{folder / OWN / UNDO}"
        arrays, about = load_arrays(folder / OWN / UNDO, kind="undo", framework="pt")
        if about.get("edit") != edit.digest:
            raise BadFile(f"{source} is of another edit; name the base model with --base")
        originals = {name: tensor for name, tensor in arrays.items() if name in names}
    else:
        raise KtError(f"{folder} holds no bytes from before the edit ({OWN}/{UNDO}); name the base model with --base")
    for name in names:
        if name not in originals or fingerprint_of([(name, originals[name])]) != fingerprints.before[name]:
            raise BadFile(
                f"{source} does not hold {name} as it was before the edit; "
                "name the model, in its revision, that the edit was written into with --base"
            )
    return originals


def _copy_rest(folder: Path, target: Path, rewritten: set[str]) -> None:
    """Copy all files except the rewritten ones and kt's subfolder, since the new folder is without the edit."""
    for path in sorted(folder.iterdir()):
        if path.name == OWN or path.name in rewritten:
            continue
        if path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copy2(path, target / path.name)


def _verify(target: Path, edit: Edit, fingerprints: Fingerprints) -> str:
    """Check the edit's weights on disk, then load the whole model; its fingerprint."""
    from ..model.load import load

    shards = Shards.open(target)
    wrong = [name for name in edit.names if fingerprints.state(name, shards.read(name)) != "base"]
    if wrong:
        raise WorkFailed(f"{target}: {wrong[0]} does not have the fingerprint from before the edit; revert again")
    try:
        return load(str(target.absolute()), device="cpu").fingerprint()
    except UnknownModel as error:
        raise WorkFailed(f"every weight is as before the edit, but the folder does not load: {error}") from error
