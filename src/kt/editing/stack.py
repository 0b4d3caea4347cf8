"""`EditStack`: several edits on one base, in order, each of which can be taken out again.

    stack = kt.EditStack([first, second])
    with stack.applied(model):     # base + first, rounded, + second, rounded: as a session writes its steps
        ...
    stack.remove(first)            # what is left gives the bytes of a stack that never had it

An edit fits where its weights are those that it was solved for: the base's, or exactly what the edits below it leave.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .._util.data import read_json, write_json
from .._util.files import check_writable
from .._util.kinds import Wanted, as_path, takes
from .._util.text import visible
from ..errors import BadFile, KtError, warn_user
from ..model.effects import Effect, together, without
from ..model.model import A_MODEL
from ..model.update import Update
from ..report import Shown, Table
from .apply import (
    MatchedWeights,
    difference,
    fingerprints,
    other_model,
    refuse_changed,
    refuse_other_shapes,
    write_checked,
)
from .edit import AN_EDIT, Edit
from .edit_io import SEEN, fits, read_by_checks
from .file_kind import STACK, is_json

if TYPE_CHECKING:
    from ..facts.fact import Fact
    from ..model.model import TracedModel


# Edits on top of each other: what one of them is in a stack, and how they are written in order.

Ground = Literal["base", "below", "forced"]
"""The weights that an edit of a stack was solved for: the base's, those that the edits below leave, or neither."""


@dataclass(frozen=True)
class Layer:
    """One edit of a stack; `forced`: it goes in though it was solved for other weights."""

    edit: Edit
    digest: str
    file: Path | None = None
    forced: bool = False

    @property
    def name(self) -> str:
        """Its name in messages: its file, else its method and its digest."""
        return str(self.file) if self.file else f"{self.edit.manifest.get('method', 'edit')} {self.digest[:12]}"


def summed(edits: Sequence[Edit]) -> tuple[dict[str, Update], dict[str, Float[Tensor, "fact d_in"]]]:
    """Updates added up and keys side by side, by weight name."""
    updates: dict[str, Update] = {}
    keys: dict[str, Tensor] = {}
    for edit in edits:
        for name, update in edit.updates.items():
            updates[name] = updates[name].plus(update) if name in updates else update
        for name, some in edit.keys.items():
            keys[name] = torch.cat([keys[name], some]) if name in keys else some
    return updates, keys


def joined(edits: Sequence[Edit]) -> Effect | None:
    """The edits' effects as one; None where they have none.

    Raises:
        KtError: they are of several kinds, places or settings, or some have updates beside.
    """
    effects = [edit.effect for edit in edits]
    known = [effect for effect in effects if effect is not None]
    if known and len({effect.place for effect in known} | {"" for effect in effects if effect is None}) > 1:
        raise KtError(
            "edits of weights, of values and of prompts do not add up to one edit; keep them as a stack "
            "(kt edits stack)"
        )
    if len({together(effect) for effect in known}) > 1:
        raise KtError(
            f"adapters at {known[0].place} whose entries are read by other settings do not add up to one edit; keep "
            "them as a stack (kt edits stack)"
        )
    return reduce(lambda one, later: one.plus(later), known[1:], known[0]) if known else None


def editors_of(edits: Sequence[Edit]) -> dict[str, Any]:
    """`editor` and `editor_seen` of edits as those of one: the trained editors' digests, and the subjects that they
    knew added up, one that is in two of the edits in each. Nothing where no editor made any."""
    digests = dict.fromkeys(digest for edit in edits if isinstance(digest := edit.manifest.get("editor"), str))
    if not digests:
        return {}
    found: list[Any] = [seen for edit in edits if fits(seen := edit.manifest.get("editor_seen"), SEEN)]
    known = [each | {"checked": read_by_checks(each)} for each in found]
    sides = dict.fromkeys(side for each in known for side in each)
    seen = {side: sum(each.get(side) or 0 for each in known) for side in sides} if known else None
    return {"editor": " + ".join(digests), "editor_seen": seen}


def facts_of(edits: Sequence[Edit]) -> list[Fact]:
    """The edits' requests, in order, as facts."""
    from ..facts.load import facts_from

    return [fact.as_request() for fact in facts_from([request for edit in edits for request in edit.requests])]


def _effects(layers: Sequence[Layer]) -> tuple[Effect, ...]:
    return tuple(layer.edit.effect for layer in layers if layer.edit.effect is not None)


def write_in_order(model: TracedModel, layers: Sequence[Layer], force: bool = False) -> list[Ground]:
    """Write the edits in order, each rounded once, and say what each was solved for. The caller puts the bytes back
    after an error.

    Raises:
        KtError: an edit fits neither the base nor what the edits below it leave (with `force`, a warning).
        WorkFailed: a weight would not be finite, or an edit would change none.
    """
    names = dict.fromkeys(name for layer in layers for name in layer.edit.names)
    for layer in layers:
        refuse_other_shapes(layer.edit, model)
    base = fingerprints(model, list(names))
    now = dict(base)
    strange = [layer.digest for layer in layers if layer.edit.effect is not None and difference(layer.edit, model)]
    grounds: list[Ground] = []
    for layer in layers:
        other = other_model(layer.edit, model)
        fits: dict[Ground, dict[str, str]] = {"base": base, "below": now} if other is None else {}
        ground: Ground = next((g for g, digests in fits.items() if _solved_for(layer.edit, digests)), "forced")
        if layer.digest in strange:  # an effect that does not fit the base
            ground = "forced" if difference(layer.edit, model) is not None else "below"
        if ground == "forced":
            why, remedy = _misfit(model, layer) if other is None else (f"{layer.name}: {other.what}", other.remedy)
            if not (force or layer.forced):
                raise KtError(f"{why}; {remedy}, or force it (force=True; kt edits stack --force --to FILE keeps it)")
            warn_user(f"forced: {why}; what it does there was not measured")
        write_checked(layer.edit, model)
        now |= fingerprints(model, layer.edit.names)
        grounds.append(ground)
    return grounds


def _solved_for(edit: Edit, digests: dict[str, str]) -> bool:
    """An edit made by hand knows no fingerprints, and fits everywhere."""
    known = edit.manifest.get("fingerprints", {})
    return all(known.get(name, digests[name]) == digests[name] for name in edit.names)


def _misfit(model: TracedModel, layer: Layer) -> tuple[str, str]:
    misfit = difference(layer.edit, model)
    what = misfit.what if misfit else "some of its weights are the base's, others what the edits below it leave"
    why = f"{layer.name} fits neither {model.name} nor the edits below it: {what}"
    return why, "put it directly on the edits that it was solved on"


class EditStack(Shown):
    """Several edits on one base, in order, each of which can be taken out again.

    An edit fits where its weights are those that it was solved for: the base's, or exactly what the edits below it
    leave. Places count from 1, the base's side first.

    Args:
        edits: the edits, the base's side first.

    Examples:
        >>> stack = kt.EditStack([edit])
        >>> len(stack.edits), stack.requests == edit.requests
        (1, True)
    """

    kind = STACK

    @takes(edits=((Iterable,), "a list of edits"))
    def __init__(self, edits: Iterable[Edit] = ()) -> None:
        self._layers: tuple[Layer, ...] = ()
        self._live: tuple[TracedModel, MatchedWeights] | None = None
        for edit in edits:
            self.push(edit)

    # Contents ---------------------------------------------------------------------------------------------------
    @property
    def layers(self) -> tuple[Layer, ...]:
        """The edits with their files, the base's side first."""
        return self._layers

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits, the base's side first."""
        return tuple(layer.edit for layer in self._layers)

    @property
    def names(self) -> tuple[str, ...]:
        """Every weight that one of the edits writes."""
        return tuple(dict.fromkeys(name for edit in self.edits for name in edit.names))

    @property
    def requests(self) -> list[dict[str, Any]]:
        """The requests of all edits, in order."""
        return [request for edit in self.edits for request in edit.requests]

    @property
    def alpha(self) -> float | None:
        """The edits' α where they share one."""
        alphas = {edit.alpha for edit in self.edits}
        return alphas.pop() if len(alphas) == 1 else None

    @property
    def manifest(self) -> dict[str, Any]:
        """The fields of an edit's manifest, as far as a stack has them."""
        methods = dict.fromkeys(str(edit.manifest.get("method")) for edit in self.edits)
        model = self.edits[0].manifest.get("model") if self.edits else None
        digests = [layer.digest for layer in self._layers]
        about = {"method": " + ".join(methods), "model": model, "stack": digests, "requests": self.requests}
        return about | editors_of(self.edits)

    @property
    def metadata(self) -> dict[str, Any]:
        """The manifest."""
        return self.manifest

    def as_dict(self, grounds: Sequence[str] | None = None) -> dict[str, Any]:
        """For `--json`: an object an edit; `grounds` says on which weights each stands in a model (see `grounds`)."""
        rows = []
        for place, layer in enumerate(self._layers, start=1):
            about = {name: layer.edit.manifest.get(name) for name in ("method", "alpha", "model", "dtype")}
            rows.append({
                "place": place,
                "file": None if layer.file is None else str(layer.file),
                "digest": layer.digest,
                **about,
                "requests": len(layer.edit.requests),
                "forced": layer.forced,
                "stands_on": self.stands_on(place),
                "solved_for": None if grounds is None else grounds[place - 1],
            })  # fmt: skip
        return {"edits": rows}

    def tables(self, grounds: Sequence[str] | None = None) -> Sequence[Table]:
        """A row an edit, the base's side first; `grounds` says on which weights each stands."""
        words = {"base": "the base", "below": "the edits below", "forced": "other weights (forced)"}
        rows = []
        for place, layer in enumerate(self._layers, start=1):
            on = ", ".join(map(str, self.stands_on(place))) or "the base"
            name, method = visible(layer.name), visible(str(layer.edit.manifest.get("method")))
            row = [place, name, method, len(layer.edit.requests), layer.edit.alpha, layer.digest[:12], on]
            rows.append(row if grounds is None else [*row, words[grounds[place - 1]]])
        columns = ["place", "edit", "method", "requests", "alpha", "digest", "stands on"]
        return [Table([*columns, *(["solved for"] if grounds is not None else [])], rows, "stack")]

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"EditStack({', '.join(map(repr, self.edits))})"

    def stands_on(self, place: int) -> list[int]:
        """Places of the edits that the one at `place` was solved on top of: those that it names (`history`), and those
        below that write a weight which it found in another state than the base's."""
        edit = self.edits[place - 1]
        named = edit.manifest.get("stands_on", ())
        base: dict[str, str] = {}
        for other in self.edits:  # the first to write a weight found the base there
            for name, digest in other.manifest.get("fingerprints", {}).items():
                base.setdefault(name, digest)
        moved = {n for n, digest in edit.manifest.get("fingerprints", {}).items() if digest != base.get(n, digest)}
        below = enumerate(self._layers[: place - 1], start=1)
        return [at for at, other in below if other.digest in named or moved & set(other.edit.names)]

    # Changing it ------------------------------------------------------------------------------------------------
    @takes(edit=AN_EDIT)
    def push(self, edit: Edit, file: Path | None = None, force: bool = False) -> None:
        """Put an edit on top; where the stack stands in a model (`apply_`), it is written there too.

        Args:
            file: where the edit was read from.
            force: take it though it was solved for other weights; said in a warning when it is written.

        Raises:
            KtError: the same edit is in the stack already, or it does not fit the model that the stack stands in.
        """
        new = Layer(edit, edit.digest, file, force)
        for place, other in enumerate(self._layers, start=1):
            if other.digest == new.digest:
                raise KtError(f"{new.name} is in the stack already, at place {place}; push it once")
        self._become((*self._layers, new))

    def remove(self, which: Edit | int, force: bool = False) -> Edit:
        """Take an edit (or that at a place) out, and give it back.

        Args:
            which: the edit, or its place, from 1.
            force: also where a later edit was solved on top of it; that one then goes in though it does not fit.

        Raises:
            KtError: no such edit, or a later one stands on it.
        """
        place = self._place(which)
        gone = self._layers[place - 1]
        above = [at for at in range(place + 1, len(self) + 1) if place in self.stands_on(at)]
        if above and not force:
            later = self._layers[above[0] - 1].name
            raise KtError(
                f"{later} (place {above[0]}) was solved on top of {gone.name}; remove that first, or force it, which "
                "keeps it on weights that it was not solved for"
            )
        left = [replace(e, forced=e.forced or at in above) for at, e in enumerate(self._layers, start=1) if at != place]
        self._become(tuple(left))
        return gone.edit

    def _place(self, which: Edit | int) -> int:
        wanted = which.digest if isinstance(which, Edit) else which
        for place, layer in enumerate(self._layers, start=1):
            if wanted in (place, layer.digest):
                return place
        known = ", ".join(f"{at} ({layer.name})" for at, layer in enumerate(self._layers, start=1)) or "nothing"
        raise KtError(f"the stack has no edit {str(wanted)[:12]}; it holds {known}")

    def _become(self, layers: tuple[Layer, ...]) -> None:
        """Take these edits; a model that the stack stands in follows, or keeps its bytes where one does not fit."""
        if self._live is not None:
            model, taken = self._live
            touched = {name for layer in layers for name in layer.edit.names}
            with model.writing():
                model.require_free(touched | set(taken.before), "change the stack after that block")
                refuse_changed(taken, model, "the stack's revert_(model, force=True)")
                base = taken.before | model.copies(touched - set(taken.before))
                with model.undone_on_failure(base) as (_, effects):
                    model.put_back(base, without(effects, self._effects))
                    write_in_order(model, layers)
                    self._live = model, MatchedWeights(base, fingerprints(model, list(base)))
                model.keep_effects(_effects(layers), self._effects)
        self._layers = layers

    # Writing ----------------------------------------------------------------------------------------------------
    @takes(model=A_MODEL)
    @contextmanager
    def applied(self, model: TracedModel, force: bool = False) -> Iterator[TracedModel]:
        """All edits written into the model inside the block, in order; the exact bytes back on exit.

        Raises:
            KtError: an edit fits neither the base nor what the edits below it leave (with `force`, a warning).
        """
        with model.restored(self.names):
            write_in_order(model, self._layers, force)
            yield model

    @takes(model=A_MODEL)
    def apply_(self, model: TracedModel, force: bool = False) -> None:
        """Write the stack into `model` for good, until `revert_`; `push` and `remove` then change the model with it.
        With `force` also into other weights than it was solved for.

        Raises:
            KtError: as `applied`; or the stack stands in a model already.
        """
        if self._live is not None:
            raise KtError(f"the stack stands in {self._live[0].name} already; revert_ it first")
        with model.writing():
            model.require_free(self.names, "apply the stack before or after that block, or as a block inside it")
            with model.undone_on_failure(self.names) as (base, _):
                write_in_order(model, self._layers, force)
                self._live = model, MatchedWeights(base, fingerprints(model, list(base)))
            model.keep_effects(self._effects)

    @takes(model=A_MODEL)
    def revert_(self, model: TracedModel, force: bool = False) -> None:
        """Bring back the exact bytes that `model` had before `apply_`.

        Raises:
            KtError: it was not applied here, or the weights were changed since (`force` puts the bytes back anyway).
        """
        if self._live is None or self._live[0].module is not model.module:
            raise KtError("this stack was not applied to this model with apply_; there is nothing to revert")
        taken = self._live[1]
        with model.writing():
            model.require_free(taken.before, "revert the stack after that block")
            if not force:
                refuse_changed(taken, model, "revert_(model, force=True)")
            model.put_back(taken.before, without(model.effects, self._effects))
            model.keep_effects((), self._effects)
        self._live = None

    @property
    def _effects(self) -> tuple[Effect, ...]:
        return _effects(self._layers)

    @takes(model=A_MODEL)
    def grounds(self, model: TracedModel, force: bool = False) -> list[Ground]:
        """The ground that each edit was solved for; `model` is left as it was. `force` is that of `apply_`.

        Raises:
            KtError: as `applied`.
        """
        with model.restored(self.names):
            return write_in_order(model, self._layers, force)

    @takes(model=A_MODEL)
    def for_model(self, model: TracedModel, force: bool = False) -> EditStack:
        """Itself where it fits the model; by force, with a warning, the same edits as a stack that goes in anyway.

        Raises:
            KtError: as `applied`.
        """
        grounds = self.grounds(model, force)
        if "forced" not in grounds:
            return self
        marked = (replace(e, forced=e.forced or g == "forced") for e, g in zip(self._layers, grounds, strict=True))
        return self._of(marked)

    def require_updates(self, what: str, kinds: Sequence[str] = ("context", "adapter")) -> None:
        """`Edit.require_updates` for each edit, with the same `what` and `kinds`."""
        for edit in self.edits:
            edit.require_updates(what, kinds)

    # As one edit ------------------------------------------------------------------------------------------------
    def control(self) -> EditStack | None:
        """The stack with every joint edit's control in its place; None where there is no joint edit."""
        controls = [edit.control() for edit in self.edits]
        if not any(controls):
            return None
        pairs = zip(self._layers, controls, strict=True)
        return self._of(replace(layer, edit=control or layer.edit) for layer, control in pairs)

    @classmethod
    def _of(cls, layers: Iterable[Layer]) -> EditStack:
        stack = cls()
        stack._layers = tuple(layers)
        return stack

    def as_sum(self) -> Edit:
        """The updates added up, apart from any model: to look at and to compare, not to write (see `total`)."""
        updates, keys = summed(self.edits)
        return Edit(updates, self.manifest | {"alpha": self.alpha}, keys=keys, effect=joined(self.edits))

    def total(self, model: TracedModel, force: bool = False) -> Edit:
        """The stack as one edit of the base weights of `model`. Where weights have 16 bits, a stack is rounded once an
        edit, its total once. `force` is that of `apply_`.

        Raises:
            KtError: the stack is empty, or as `applied`.
        """
        from .package import about_requests, about_weights, read_back
        from .rounding import readings

        if not self._layers:
            raise KtError("the stack is empty; push an edit first")
        self.grounds(model, force)
        whole, facts = self.as_sum(), facts_of(self.edits)
        parts = [{n: e.manifest.get(n) for n in ("method", "alpha", "hyper_parameters", "seed")} for e in self.edits]
        whole.manifest |= {"steps": [len(e.requests) for e in self.edits], "parts": parts}
        whole.manifest |= about_weights(model, whole.updates) | about_requests(facts)
        read_back(model, whole, facts, readings(model, facts))
        return whole

    # Keeping ----------------------------------------------------------------------------------------------------
    @takes()
    def save(self, path: str | Path) -> Path:
        """Write the stack's JSON to `path`. An edit without a file in its folder is written there, named by its digest.

        Raises:
            NotWritable: with the reason.
        """
        path = Path(path)
        check_writable(path)
        entries = []
        for layer in self.layers:
            file = None if layer.file is None else _relative(layer.file, path.parent)
            if file is None:
                file = f"{layer.digest[:16]}.safetensors"
                layer.edit.save(path.parent / file)
            entries.append({"file": file, "digest": layer.digest, "forced": layer.forced})
        return write_json(path, {"kind": STACK, "model": self.manifest["model"], "edits": entries})

    @classmethod
    def load(cls, path: str | Path) -> EditStack:
        """Read a stack's JSON at `path` and the edit files that it names.

        Raises:
            BadFile: not there, not a stack, or an edit file that is broken, changed, or not in the stack's folder.
        """
        return load_stack(path)


AnyEdit = Edit | EditStack
"""An edit or a stack, which commands write into a model for a while and judge."""
ANY_EDIT: Wanted = ((Edit, EditStack), "an edit or a stack, as kt.edit or EditStack returns it")
"""An edit or a stack of a public function."""


# A stack as JSON beside its edit files, and whatever `--edit` may name: an edit file or a stack.
#
#     {"kind": "edit-stack", "edits": [{"file": "a.safetensors", "digest": "...", "forced": false}, ...]}
#
# Files are named relative to the JSON and lie in its folder or below: a stack moves with its folder, and reading one
# cannot be led anywhere else.


def load_stack(path: str | Path) -> EditStack:
    """Read the JSON and every edit that it names; see `EditStack.load`."""
    path = as_path(path)
    contents = read_json(path)
    if contents.get("kind") != STACK:
        held = contents.get("kind") or "JSON of another program"
        raise BadFile(f"{path}: holds {held}, expected {STACK}; is it the right file?")
    entries = contents.get("edits")
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
    return load_stack(path) if is_json(Path(path)) else Edit.load(path)


def _layer(path: Path, place: int, entry: Any) -> Layer:
    values = entry if isinstance(entry, dict) else {}
    file, digest, forced = (values.get(name) for name in ("file", "digest", "forced"))
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
