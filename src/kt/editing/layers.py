"""Edits on top of each other: what one of them is in a stack, and how they are written in order."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import KtError
from ..sites import Update
from .applying import difference, fingerprints, refuse_other_shapes, write_checked
from .edit import Edit

if TYPE_CHECKING:
    from ..facts.fact import Fact
    from ..model import TracedModel

Ground = Literal["base", "below", "forced"]
"""What an edit of a stack was solved for: the base's weights, those that the edits below leave, or neither."""


@dataclass(frozen=True)
class Layer:
    """One edit of a stack; `forced`: it goes in though it was solved for other weights."""

    edit: Edit
    digest: str
    file: Path | None = None
    forced: bool = False

    @property
    def name(self) -> str:
        """What messages call it: its file, else its method and its digest."""
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


def facts_of(edits: Sequence[Edit]) -> list[Fact]:
    """The edits' requests, in order, as facts."""
    from ..facts.load import facts_from

    return [fact.as_request() for fact in facts_from([request for edit in edits for request in edit.requests])]


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
    grounds: list[Ground] = []
    for layer in layers:
        fits: dict[Ground, dict[str, str]] = {"base": base, "below": now}
        ground: Ground = next((g for g, held in fits.items() if _solved_for(layer.edit, held)), "forced")
        if ground == "forced":
            why = _misfit(model, layer)
            if not (force or layer.forced):
                raise KtError(f"{why}; put it directly on the edits that it was solved on, or force it")
            warnings.warn(f"forced: {why}; what it does there was not measured", stacklevel=3)
        write_checked(layer.edit, model)
        now |= fingerprints(model, layer.edit.names)
        grounds.append(ground)
    return grounds


def _solved_for(edit: Edit, held: dict[str, str]) -> bool:
    """An edit made by hand knows no fingerprints, and fits everywhere."""
    known = edit.manifest.get("fingerprints", {})
    return all(known.get(name, held[name]) == held[name] for name in edit.names)


def _misfit(model: TracedModel, layer: Layer) -> str:
    found = difference(layer.edit, model)
    what = found.what if found else "some of its weights are the base's, others what the edits below it leave"
    return f"{layer.name} fits neither {model.name} nor the edits below it: {what}"
