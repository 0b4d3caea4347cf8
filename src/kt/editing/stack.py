"""`EditStack`: several edits on one base, in order, each of which can be taken out again.

    stack = kt.EditStack([first, second])
    with stack.applied(model):     # base + first, rounded, + second, rounded: as a session writes its steps
        ...
    stack.remove(first)            # what is left gives the bytes of a stack that never had it

An edit fits where its weights are those that it was solved for: the base's, or exactly what the edits below it leave.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import KtError
from .edit import Edit
from .layers import Ground, Layer, facts_of, summed, write_in_order

if TYPE_CHECKING:
    from ..model import TracedModel


class EditStack:
    """See the module. Places count from 1, the base's side first."""

    def __init__(self, edits: Iterable[Edit] = ()) -> None:
        self._layers: tuple[Layer, ...] = ()
        self._live: tuple[TracedModel, dict[str, Tensor]] | None = None
        for edit in edits:
            self.push(edit)

    # What it is -------------------------------------------------------------------------------------------------
    @property
    def layers(self) -> tuple[Layer, ...]:
        return self._layers

    @property
    def edits(self) -> tuple[Edit, ...]:
        return tuple(layer.edit for layer in self._layers)

    @property
    def names(self) -> tuple[str, ...]:
        """Every weight that one of the edits writes."""
        return tuple(dict.fromkeys(name for edit in self.edits for name in edit.names))

    @property
    def requests(self) -> list[dict[str, Any]]:
        return [request for edit in self.edits for request in edit.requests]

    @property
    def alpha(self) -> float | None:
        """The edits' α where they share one."""
        found = {edit.alpha for edit in self.edits}
        return found.pop() if len(found) == 1 else None

    @property
    def manifest(self) -> dict[str, Any]:
        """What an edit's manifest would say, as far as a stack has it."""
        methods = dict.fromkeys(str(edit.manifest.get("method")) for edit in self.edits)
        model = self.edits[0].manifest.get("model") if self.edits else None
        digests = [layer.digest for layer in self._layers]
        return {"method": " + ".join(methods), "model": model, "stack": digests, "requests": self.requests}

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"EditStack({', '.join(map(repr, self.edits))})"

    def stands_on(self, place: int) -> list[int]:
        """The places of the edits that this one was solved on top of: those that it names (`history`), and those below
        that write a weight which it found in another state than the base's."""
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
            model, base = self._live
            touched = {name for layer in layers for name in layer.edit.names}
            base |= model.copies(touched - set(base))
            now = model.copies(base)
            try:
                model.put_back(base)
                write_in_order(model, layers)
            except BaseException:
                model.put_back(now)
                raise
        self._layers = layers

    # Writing ----------------------------------------------------------------------------------------------------
    @contextmanager
    def applied(self, model: TracedModel, force: bool = False) -> Iterator[TracedModel]:
        """All edits written into the model inside the block, in order; the exact bytes back on exit.

        Raises:
            KtError: an edit fits neither the base nor what the edits below it leave (with `force`, a warning).
        """
        with model.restored(self.names):
            write_in_order(model, self._layers, force)
            yield model

    def apply_(self, model: TracedModel, force: bool = False) -> None:
        """Write the stack for good, until `revert_`; `push` and `remove` then change the model with it.

        Raises:
            KtError: as `applied`; or the stack stands in a model already.
        """
        if self._live is not None:
            raise KtError(f"the stack stands in {self._live[0].name} already; revert_ it first")
        base = model.copies(self.names)
        try:
            write_in_order(model, self._layers, force)
        except BaseException:
            model.put_back(base)
            raise
        self._live = (model, base)

    def revert_(self, model: TracedModel) -> None:
        """Bring back the base's exact bytes."""
        if self._live is None or self._live[0].module is not model.module:
            raise KtError("this stack was not applied to this model with apply_; there is nothing to revert")
        model.put_back(self._live[1])
        self._live = None

    def grounds(self, model: TracedModel, force: bool = False) -> list[Ground]:
        """What each edit was solved for; the model is left as it was.

        Raises:
            KtError: as `applied`.
        """
        with model.restored(self.names):
            return write_in_order(model, self._layers, force)

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

    # As one -----------------------------------------------------------------------------------------------------
    def control(self) -> EditStack | None:
        """The stack with every joint edit's control in its place; None where there is no joint edit."""
        controls = [edit.control() for edit in self.edits]
        if not any(controls):
            return None
        pairs = zip(self._layers, controls, strict=True)
        return self._of(replace(layer, edit=control or layer.edit) for layer, control in pairs)

    @classmethod
    def _of(cls, layers: Iterable[Layer]) -> EditStack:
        found = cls()
        found._layers = tuple(layers)
        return found

    def as_sum(self) -> Edit:
        """The updates added up, apart from any model: to look at and to compare, not to write (see `total`)."""
        updates, keys = summed(self.edits)
        return Edit(updates, self.manifest | {"alpha": self.alpha}, keys=keys)

    def total(self, model: TracedModel, force: bool = False) -> Edit:
        """The stack as one edit of the base's weights. Where weights have 16 bits, a stack is rounded once an edit,
        its total once.

        Raises:
            KtError: the stack is empty, or as `applied`.
        """
        from .package import about_requests, about_weights, read_back
        from .readings import readings

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
    def save(self, path: str | Path) -> Path:
        """Write the stack's JSON; see stack_file.py."""
        from .stack_file import save_stack

        return save_stack(self, path)

    @classmethod
    def load(cls, path: str | Path) -> EditStack:
        """Read a stack's JSON and the edit files that it names.

        Raises:
            BadFile: not there, not a stack, or an edit file that is broken, changed, or not in the stack's folder.
        """
        from .stack_file import load_stack

        return load_stack(path)


AnyEdit = Edit | EditStack
"""What commands write into a model for a while, and judge: `applied`, `control`, `requests`."""
