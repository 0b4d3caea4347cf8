"""The way back: an edit taken out of the folder that it was merged into, the exact bytes from before in its place.

What a weight is follows from its fingerprint: `base` (from before the edit), `applied` (with the edit), or `other`.
The bytes from before come from `kt/undo.safetensors` in the folder, or from the base model, and count only if their
fingerprints are those of the weights that the edit was written into.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
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


class Known(NamedTuple):
    """Fingerprints by weight, before the edit and with it."""

    before: Mapping[str, str]
    after: Mapping[str, str]

    def state(self, name: str, tensor: Tensor) -> str:
        """`base`, `applied` or `other`."""
        found = fingerprint_of([(name, tensor)])
        return "base" if found == self.before[name] else "applied" if found == self.after.get(name) else "other"


@dataclass(frozen=True)
class Reverted(Shown):
    """`weights` says what each was found to be; `fingerprint` is the whole model's, as it is now at `path`."""

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
    """Put the bytes from before an edit back into a folder of merged weights, and prove it.

    In place each file is replaced whole. If that is cut off between two files, every weight is either as before the
    edit or as with it, and calling this again finishes.

    Args:
        edit: which edit; by default the one that the folder carries.
        base: the model from before, a name or loaded; by default the bytes in the folder's `kt/undo.safetensors`.
        to: write a new folder, whole or not at all, and leave the first one as it is.

    Raises:
        KtError: no edit or no bytes from before are at hand, or a weight is neither as before the edit nor as with it.
        BadFile: the folder or a file in it is broken or of another edit.
        NotWritable: the disk is full or read-only, or `to` is taken.
        WorkFailed: what was written does not have the fingerprints from before.
    """
    folder = Path(folder)
    shards = Shards.open(folder)
    edit = _edit(folder, edit)
    known = _known(folder, edit)
    states = {name: known.state(name, shards.read(name)) for name in edit.names}
    _refuse_other(folder, states)
    inside = [name for name, state in states.items() if state == "applied"]
    originals = _originals(folder, shards, edit, inside, base, known) if inside else {}
    with ExitStack() as stack:
        target = folder
        if to is not None:
            target = stack.enter_context(whole_folder(to))
            _copy_rest(folder, target, {shards.files[name] for name in inside})
        for file in sorted({shards.files[name] for name in inside}):
            shards.write(file, {n: t for n, t in originals.items() if shards.files[n] == file}, target)
        fingerprint = _prove(target, edit, known)
    return Reverted(Path(to or folder), True, not inside, fingerprint, states)


def _edit(folder: Path, edit: Edit | str | Path | None) -> Edit:
    from ..editing import Edit

    if isinstance(edit, Edit):
        return edit
    if edit is None and not (folder / OWN / EDIT).is_file():
        raise KtError(f"{folder} carries no edit ({OWN}/{EDIT}); name the edit file that was merged with --edit")
    return Edit.load(edit or folder / OWN / EDIT)


def _known(folder: Path, edit: Edit) -> Known:
    """From the folder's own record, if it is of this edit: it may have been written into another dtype than solved."""
    record: Mapping[str, Any] = edit.manifest
    if (folder / OWN / ABOUT).is_file():
        about = read_json(folder / OWN / ABOUT)
        if about.get("edit") == edit.digest:
            record = about
        elif (folder / OWN / EDIT).is_file():
            raise KtError(f"{folder} was written with another edit than the one named; leave out --edit")
    found = Known(*(record.get(key) or {} for key in ("fingerprints", "fingerprints_after")))
    maps = all(isinstance(part, Mapping) for part in found)
    whole = maps and all(isinstance(found.before.get(name), str) for name in edit.names)
    if not whole:
        raise BadFile(f"{folder}: no fingerprints from before the edit are known; export the edit again")
    return found


def _refuse_other(folder: Path, states: Mapping[str, str]) -> None:
    other = [name for name, state in states.items() if state == "other"]
    if other:
        shown = ", ".join(other[:3]) + (", ..." if len(other) > 3 else "")
        raise KtError(
            f"{folder}: {len(other)} of {len(states)} weights are neither as before the edit nor as with it ({shown}); "
            "they were changed since, or are of another model or dtype; nothing was written"
        )


def _originals(
    folder: Path, shards: Shards, edit: Edit, names: list[str], base: TracedModel | str | None, known: Known
) -> dict[str, Tensor]:
    """The bytes from before, of proven origin."""
    if base is not None:
        source = "the base model"
        model = _base(base, shards.read(names[0]).dtype)
        found = {name: model.own(name).detach().cpu() for name in names}
    elif (folder / OWN / UNDO).is_file():
        source = f"{folder / OWN / UNDO}"
        arrays, about = load_arrays(folder / OWN / UNDO, kind="undo", framework="pt")
        if about.get("edit") != edit.digest:
            raise BadFile(f"{source} is of another edit; name the base model with --base")
        found = {name: tensor for name, tensor in arrays.items() if name in names}
    else:
        raise KtError(f"{folder} holds no bytes from before the edit ({OWN}/{UNDO}); name the base model with --base")
    for name in names:
        if name not in found or fingerprint_of([(name, found[name])]) != known.before[name]:
            raise BadFile(
                f"{source} does not hold {name} as it was before the edit; "
                "name the model, in its revision, that the edit was written into with --base"
            )
    return found


def _base(base: TracedModel | str, dtype: torch.dtype) -> TracedModel:
    from ..model.load import load

    return load(base, dtype=dtype, device="cpu") if isinstance(base, str) else base


def _copy_rest(folder: Path, target: Path, rewritten: set[str]) -> None:
    """Everything but the files that are written anew and what kt keeps of the edit, which is out of the new folder."""
    for path in sorted(folder.iterdir()):
        if path.name == OWN or path.name in rewritten:
            continue
        if path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copy2(path, target / path.name)


def _prove(target: Path, edit: Edit, known: Known) -> str:
    """Read back what is on the disk: each weight of the edit, then the whole model as it loads."""
    from ..model.load import load

    again = Shards.open(target)
    wrong = [name for name in edit.names if known.state(name, again.read(name)) != "base"]
    if wrong:
        raise WorkFailed(f"{target}: {wrong[0]} does not have the fingerprint from before the edit; revert again")
    try:
        return load(str(target.absolute()), device="cpu").fingerprint()
    except UnknownModel as error:
        raise WorkFailed(f"every weight is as before the edit, but the folder does not load: {error}") from error
