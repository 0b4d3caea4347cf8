"""Remove an edit from the folder into which it was merged, and restore the exact original bytes.

A weight's fingerprint tells its state: `base` (before the edit), `applied` (with the edit), or `other`. The original
bytes come from `kt/undo.safetensors` in the folder, or from the base model, and are used only if their fingerprints are
those of the weights before the edit. Which these are, the base model or the edit that the user names decides; the
folder's own record, which whoever wrote the folder could forge, decides only where neither is named.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, NamedTuple

from torch import Tensor

from .._util.data import load_arrays, read_json
from .._util.kinds import Wanted, takes
from .._util.text import some_of, visible
from ..editing.edit import Edit
from ..errors import BadFile, KtError, UnknownModel, WorkFailed
from ..model.devices import content
from ..model.folder import regular_files
from ..model.mixture import slice_of
from ..model.model import TracedModel
from ..model.update import fingerprint_of
from ..report import Shown, Table
from .card import CARD, is_ours
from .hf import ABOUT, EDIT, OWN, UNDO, carries, same_bytes
from .shards import Shards, saved_names, whole_folder

AN_EDIT_OR_FILE: Wanted = (
    (Edit, str, os.PathLike, NoneType),
    "an edit, as kt.edit or Edit.load returns it, its file, or None",
)
A_BASE: Wanted = ((TracedModel, str, NoneType), "the model that kt.load returns, its name, or None")
RECORD = "the folder's own record"


class Fingerprints(NamedTuple):
    """Fingerprints by weight, before the edit and with it; whose word they are, and the record's of the latter."""

    before: Mapping[str, str]
    after: Mapping[str, str]
    source: str = RECORD
    recorded: Mapping[str, str] = MappingProxyType({})

    def state(self, name: str, tensor: Tensor) -> str:
        """`base`, `applied` or `other`."""
        value = fingerprint_of([(name, tensor)])
        if value == self.before[name]:
            return "base"
        return "applied" if value in (self.after.get(name), self.recorded.get(name)) else "other"


@dataclass(frozen=True)
class Reverted(Shown):
    """The reverted folder: the previous state of each weight, and the fingerprint of the whole model at `path`.

    `proof` says whose word the bytes from before are: the base model's, the named edit's, or the folder's own.
    """

    path: Path
    restored: bool
    already: bool
    fingerprint: str
    weights: dict[str, str]
    proof: str = RECORD
    dequantised: str | None = None

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
        return [Table(["weight", "was", "is"], rows, f"weights of {self.path}", self.dequantised or "")]


@takes(edit=AN_EDIT_OR_FILE, base=A_BASE)
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
        edit: the edit to remove; by default the one in the folder. One that is named decides which bytes were before.
        base: the original model, by name or loaded; by default the bytes in the folder's `kt/undo.safetensors`. One
            that is named decides, also over all other weights.
        to: write a new folder, atomically, and leave the first one unchanged.

    Raises:
        KtError: there is no edit or no original bytes, a weight is neither as before the edit nor as with it, or the
            named edit and base contradict each other or the folder.
        BadFile: the folder or a file in it is broken or of another edit, or a link in it leads elsewhere.
        NotWritable: the disk is full or read-only, or `to` is not empty.
        WorkFailed: the written weights do not have their original fingerprints.
    """
    folder = Path(folder)
    _refuse_packed(folder)
    shards = Shards.open(folder, _names(folder))
    fingerprints, edit = known_fingerprints(folder, loaded := _edit(folder, edit), edit is not None), loaded
    copied = [] if to is None else [p for p in regular_files(folder) if p.relative_to(folder).parts[0] != OWN]
    card = folder / CARD if is_ours(folder / CARD) else None  # it speaks of the edit
    if base is not None:
        base = _base(base, shards, edit)
        shards = Shards.open(folder, saved_names(base.module))
        fingerprints = _by_base(folder, shards, edit, base, fingerprints)
    states = {name: fingerprints.state(name, shards.read(name)) for name in edit.names}  # refuses what is not there

    def file_of(name: str) -> str:
        return str(shards.file_of(name))

    _refuse_other(folder, states, edit)
    edited = [name for name, state in states.items() if state == "applied"]
    originals = _originals(folder, edit, edited, base, fingerprints) if edited else {}
    with ExitStack() as stack:
        target = folder
        if to is not None:
            target = stack.enter_context(whole_folder(to))
            rewritten = {folder / file_of(name) for name in edited}
            for path in copied:
                if path not in rewritten and path != card:
                    (target / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(path, target / path.relative_to(folder))
        for file in sorted({file_of(name) for name in edited}):
            shards.write(file, {n: t for n, t in originals.items() if file_of(n) == file}, target)
        fingerprint = _verify(Shards.open(target, shards.names), edit, fingerprints, base)
    if to is None and card is not None:
        card.unlink()
    return Reverted(Path(to or folder), True, not edited, fingerprint, states, fingerprints.source, edit.dequantised)


def _record(folder: Path) -> dict[str, Any]:
    """What the folder says of its export; empty where it says nothing."""
    return read_json(folder / OWN / ABOUT) if (folder / OWN / ABOUT).is_file() else {}


def _refuse_packed(folder: Path) -> None:
    if (about := _record(folder)).get("packed"):
        raise KtError(
            f"{folder} holds weights dequantised that its model keeps packed, and not their packed bytes; the model "
            f"before the edit is {visible(str(about.get('model')))[:200]}, as it was merged from"
        )


def _names(folder: Path) -> dict[str, str]:
    """The names in the files of weights that the model calls otherwise, by the folder's record."""
    names = _record(folder).get("names", {})
    if not isinstance(names, dict) or not all(isinstance(each, str) for each in names.values()):
        raise BadFile(f"{folder / OWN / ABOUT}: names are no texts by weight; export the edit again")
    return names


def _edit(folder: Path, edit: Edit | str | Path | None) -> Edit:
    if isinstance(edit, Edit):
        edit.require_updates("a merged folder")
        return edit
    if edit is None and not (folder / OWN / EDIT).is_file():
        raise KtError(f"{folder} carries no edit ({OWN}/{EDIT}); name the edit file that was merged with --edit")
    return _edit(folder, Edit.load(edit or folder / OWN / EDIT))


def known_fingerprints(folder: Path, edit: Edit, named: bool = False) -> Fingerprints:
    """From an edit that the user names; else from the folder's record if it is of this edit (its dtype may not be the
    one of solving), else from the edit in the folder."""
    about = _record(folder)
    of_this = about.get("edit") == edit.digest
    own = edit.manifest.get("fingerprints")
    if named and isinstance(own, Mapping) and all(isinstance(own.get(name), str) for name in edit.names):
        after = edit.manifest.get("fingerprints_after") or {}
        recorded = about.get("fingerprints_after") if of_this else {}
        parts = [part if isinstance(part, Mapping) else {} for part in (after, recorded)]
        return Fingerprints(own, parts[0], "the edit that was named", parts[1])
    if about and not of_this and (folder / OWN / EDIT).is_file():
        raise KtError(f"{folder} was written with another edit than the one named; leave out --edit")
    record: Mapping[str, Any] = about if of_this else edit.manifest
    fingerprints = Fingerprints(record.get("fingerprints") or {}, record.get("fingerprints_after") or {})
    if not all(isinstance(part, Mapping) for part in fingerprints[:2]) or not all(
        isinstance(fingerprints.before.get(name), str) for name in edit.names
    ):
        raise BadFile(f"{folder}: no fingerprints from before the edit are known; export the edit again")
    return fingerprints


def _base(base: TracedModel | str, shards: Shards, edit: Edit) -> TracedModel:
    if not isinstance(base, str):
        return base
    from ..model.load import load

    return load(base, dtype=shards.read(edit.names[0]).dtype, device="cpu")


def _by_base(folder: Path, shards: Shards, edit: Edit, base: TracedModel, known: Fingerprints) -> Fingerprints:
    """The fingerprints of the base model, which must agree with those that are known; every other weight is its too."""
    before = {name: base.fingerprint([name]) for name in edit.names}
    wrong = [name for name in edit.names if before[name] != known.before[name]]
    if wrong:
        raise BadFile(
            f"the base model does not hold {wrong[0]} as it was before the edit, by {known.source}; "
            "name the model, in its revision, that the edit was written into with --base"
        )
    own = dict(base.module.state_dict())
    others = [name for name in shards.files if name in own and name not in before]
    touched: dict[str, set[int]] = {}
    for path, number in map(slice_of, edit.names):
        touched.setdefault(path, set()).update(() if number is None else (number,))

    def untouched(name: str, tensor: Tensor) -> Tensor:
        """Of a parameter with an axis over experts, those that the edit does not write."""
        written = touched.get(name)
        return tensor[[n for n in range(len(tensor)) if n not in written]] if written else tensor

    changed = [
        name
        for name in others
        if not same_bytes(untouched(name, shards.read(name)), untouched(name, content(base.module, name, own[name])))
    ]
    if changed:
        shown = some_of(changed, rest=", ...")
        raise KtError(
            f"{folder}: {len(changed)} weights that the edit does not touch are not the base model's ({shown}); "
            "nothing was written; export the edit from the base model again"
        )
    return known._replace(before=before, source="the base model")


def _refuse_other(folder: Path, states: Mapping[str, str], edit: Edit) -> None:
    other = [name for name, state in states.items() if state == "other"]
    if other:
        if (folder / OWN / ABOUT).is_file() and not carries(folder, edit):
            raise KtError(f"{folder} was written with another edit than the one named; leave out --edit")
        shown = some_of(other, rest=", ...")
        raise KtError(
            f"{folder}: {len(other)} of {len(states)} weights are neither as before the edit nor as with it ({shown}); "
            "they were changed since, or are of another model or dtype; nothing was written"
        )


def _originals(
    folder: Path, edit: Edit, names: list[str], base: TracedModel | None, fingerprints: Fingerprints
) -> dict[str, Tensor]:
    """The original weights, verified by their fingerprints."""
    if base is not None:
        source = "the base model"
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


def _verify(shards: Shards, edit: Edit, fingerprints: Fingerprints, base: TracedModel | None) -> str:
    """Check the edit's weights on disk, then load the whole model; its fingerprint, which is the base model's."""
    from ..model.load import load

    target = shards.folder
    wrong = [name for name in edit.names if fingerprints.state(name, shards.read(name)) != "base"]
    if wrong:
        raise WorkFailed(f"{target}: {wrong[0]} does not have the fingerprint from before the edit; revert again")
    try:
        kind = "auto" if base is None else base.dtype
        found = load(str(target.absolute()), device="cpu", dtype=kind).fingerprint()
    except (UnknownModel, BadFile) as error:
        raise WorkFailed(
            f"every weight is as before the edit, but the folder does not load: {error}; "
            "copy its other files from the base model"
        ) from error
    if base is not None and found != base.fingerprint():
        raise WorkFailed(
            f"every weight of the edit is as before it, but the model in {target} is not the base model; "
            "name the one that was merged with --base"
        )
    return found
