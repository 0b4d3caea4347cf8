"""Writing an edit into the weights that it was solved for, and restoring their exact bytes.

A weight is in one of three states, by its SHA-256: `base`, as when the edit was solved; `applied`, as the edit leaves
it; `other`. Only an edit whose weights are all `base`, in a model with the config and the tokenizer that it was solved
with, is written, unless by force, which says what differs.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from .._util.text import some_of, visible
from ..errors import KtError, WorkFailed, warn_user
from ..model.effects import Effect, same_effect
from ..model.identity import about
from ..runs.journal import first_difference
from ..runs.provenance import version
from .rounding import is_narrow

if TYPE_CHECKING:
    from ..model.model import TracedModel
    from ..model.update import Update
    from ..model.weights import Copy


FileState = Literal["base", "applied", "other"]


class MatchedWeights(NamedTuple):
    """A model's weights before `apply_` wrote an edit: their bytes, and their fingerprints with the edit in them."""

    before: dict[str, Copy]
    after: dict[str, str]


class Applicable(Protocol):
    """The parts of an `Edit` that writing it needs."""

    updates: dict[str, Update]
    manifest: dict[str, Any]
    effect: Effect | None

    @property
    def names(self) -> tuple[str, ...]: ...

    def delta(self, name: str) -> Tensor: ...

    def taken(self, model: TracedModel) -> MatchedWeights | None: ...


class Difference(NamedTuple):
    """Why an edit does not fit a model: what differs, and what to do about it."""

    what: str
    remedy: str


def fingerprints(model: TracedModel, names: Sequence[str]) -> dict[str, str]:
    """Each weight's SHA-256 in this model (over name, dtype, shape and bytes)."""
    return {name: model.fingerprint([name]) for name in names}


def states(edit: Applicable, model: TracedModel) -> dict[str, FileState]:
    """Every weight's state. One whose fingerprint the edit does not know (an edit made by hand) counts as `base`."""
    now = fingerprints(model, edit.names)
    base, after = edit.manifest.get("fingerprints", {}), edit.manifest.get("fingerprints_after", {})
    taken = edit.taken(model)
    written = {} if taken is None else taken.after

    def state(name: str) -> FileState:
        if now[name] == base.get(name):
            return "base"
        if now[name] in (after.get(name), written.get(name)):
            return "applied"
        return "other" if name in base else "base"

    return {name: state(name) for name in edit.names}


def refuse_other_shapes(edit: Applicable, model: TracedModel) -> None:
    """Refuse an edit that no force can write.

    Raises:
        UnknownSite: the model has no weight of that name.
        KtError: a weight is offloaded, quantised, of another shape, or one that two names of the edit stand for.
    """
    if edit.effect is not None:
        edit.effect.refuse(model)
    seen: dict[Hashable, str] = {}
    for name in edit.names:
        weight, shape = model.weight(name), edit.updates[name].shape
        if tuple(weight.shape) != shape:
            raise KtError(
                f"{name} has another shape in {model.name}: {tuple(weight.shape)}, where the update has {shape}; "
                f"the edit was solved for {edit.manifest.get('model')}"
            )
        other = seen.setdefault(model.identity_of(name), name)
        if other != name:
            raise KtError(f"{other} and {name} are one tied weight in {model.name}; write it under one name")


def difference(edit: Applicable, model: TracedModel) -> Difference | None:
    """Why the model is not the one that the edit was solved for; None where it is."""
    if edit.effect is not None:
        if any(same_effect(edit.effect, other) for other in model.effects):
            return Difference(f"the edit is already applied to {model.name}", "revert it first")
        what = edit.effect.misfit(model)
        return other_model(edit, model) if what is None else Difference(what, f"load the model it names, {_base(edit)}")
    now = states(edit, model)
    base, after = edit.manifest.get("fingerprints", {}), edit.manifest.get("fingerprints_after", {})
    # A weight that rounding left unchanged is the same before and after, and tells nothing.
    telling = [n for n in now if n not in base or base[n] != after.get(n)]
    applied, other = ([n for n in now if now[n] == state] for state in ("applied", "other"))
    if not applied and not other:
        return other_model(edit, model)
    if applied and set(applied) == set(telling):
        what = f"the edit is already applied to {model.name}: all its weights are as it leaves them"
        return Difference(what, f"revert it first, or load {_base(edit)} anew")
    if applied:
        rest = [n for n in telling if n not in applied]
        what = f"the edit is partly applied to {model.name}: {_some(applied, now)} hold it, {some_of(rest)} not"
        return Difference(what, f"load {_base(edit)} anew")
    dtype, loaded = edit.manifest.get("dtype"), str(model.dtype).removeprefix("torch.")
    if dtype is not None and dtype != loaded:
        what = f"the edit was solved in {dtype}, and {model.name} is loaded in {loaded}"
        return Difference(what, f"load it with --dtype {dtype}")
    what = f"{_some(other, now)} in {model.name} are not the weights that the edit was solved for"
    return Difference(what, f"load the model it names, {_base(edit)}")


def other_model(edit: Applicable, model: TracedModel) -> Difference | None:
    """How config or tokenizer differ from those that the edit was solved with; None where they do not.

    Of an edit of an older kt, which did not note them, a warning says so once. Keys of a config that one version of
    transformers has and another has not tell nothing.
    """
    if edit.manifest.get("identity") is None:
        if edit.manifest.get("fingerprints"):
            say_unnoted(f"{edit.manifest.get('method')} edit of {_base(edit)}")
        return None
    made = made_with_other(edit.manifest, model)
    if made is None:
        return None
    return Difference(f"the edit was solved {made}", f"load the model it names, {_base(edit)}")


def made_with_other(manifest: Mapping[str, Any], model: TracedModel) -> str | None:
    """With which other config or tokenizer than the model's a file was made, by `identity` and `versions` of its
    manifest, in words; None where they do not differ."""
    noted, now = manifest["identity"], about(model)
    solved, name = noted["config"], "transformers"
    if (manifest.get("versions") or {}).get(name) != version(name):
        now["config"] = {key: value for key, value in now["config"].items() if key in solved}
        solved = {key: value for key, value in solved.items() if key in now["config"]}
    if (found := first_difference(solved, now["config"])) is not None:
        key, before, here = found
        return f"with {visible(f'{key}{str(before)[:80]}')[:160]}, and {model.name} has {str(here)[:80]}"
    if noted["tokenizer"] != now["tokenizer"]:
        return f"with another tokenizer than that of {model.name}, though on the same weights"
    return None


@cache
def say_unnoted(file: str) -> None:
    warn_user(f"the {file} is of an older kt, which did not note config and tokenizer: only its weights were compared")


def admit(edit: Applicable, model: TracedModel, force: bool) -> Difference | None:
    """Let an edit be written, or refuse; by force, warn of what differs and return it.

    Raises:
        UnknownSite, KtError: see `refuse_other_shapes`; or, without force, the weights are not the edit's.
    """
    refuse_other_shapes(edit, model)
    misfit = difference(edit, model)
    if misfit is None:
        return None
    if not force:
        raise KtError(f"{misfit.what}; {misfit.remedy}, or write it all the same with force=True (--force)")
    warn_user(f"forced: {misfit.what}; what it does there was not measured")
    return misfit


def write_checked(edit: Applicable, model: TracedModel) -> None:
    """Add every update to its weight, and check the result. The caller puts the bytes back on a failure.

    Raises:
        WorkFailed: an update or a written weight is not finite, or the updates are not zero and no weight changed.
    """
    nonzero, changed = False, "control" in edit.manifest  # a control may change nothing: that is a result
    if edit.effect is not None:
        model.effects = (*model.effects, edit.effect)
    for name in edit.names:
        model.unpack(name)
        weight, delta = model.own(name), edit.delta(name)
        if not bool(torch.isfinite(delta).all()):
            raise WorkFailed(f"the update of {name} is not finite; nothing was written; solve the edit again")
        before = weight.detach().clone()
        model.write(name, delta)
        if not bool(torch.isfinite(weight).all()):
            raise WorkFailed(
                f"{name} is not finite with the edit in it (in {_dtype(weight)}); nothing was written; "
                + ("load the model with --dtype float32" if is_narrow(weight) else "solve a smaller edit")
            )
        nonzero, changed = nonzero or bool(delta.any()), changed or not torch.equal(weight, before)
    if nonzero and not changed:
        raise WorkFailed(
            f"the edit changed no weight: every update is lost in rounding to {_dtype(weight)}; nothing was written; "
            + "load the model with --dtype float32, or " * is_narrow(weight)
            + "solve a larger edit"
        )


def refuse_changed(taken: MatchedWeights, model: TracedModel, give_up: str, since: str = "apply_") -> None:
    """Refuse to put bytes back over weights that another program, or another edit, has changed since.

    Args:
        give_up: what puts them back anyway.
        since: what wrote the weights as they were taken.

    Raises:
        KtError: weights hold neither what `since` left nor the bytes from before it.
    """
    now = fingerprints(model, list(taken.before))
    moved = [name for name in taken.before if now[name] != taken.after[name]]
    changed = [name for name in moved if not model.holds(name, taken.before[name])]
    if changed:
        raise KtError(
            f"{len(changed)} of {len(taken.before)} weights ({', '.join(changed[:3])}) were changed after {since}; "
            f"take that back first, or give it up with {give_up}"
        )


def _base(edit: Applicable) -> str:
    name, revision = edit.manifest.get("model"), edit.manifest.get("revision")
    return "the unedited model" if name is None else f"{name}@{revision}" if revision else str(name)


def _some(chosen: Sequence[str], known: dict[str, FileState]) -> str:
    return f"{len(chosen)} of {len(known)} weights ({some_of(chosen)})"


def _dtype(weight: Tensor) -> str:
    return str(weight.dtype).removeprefix("torch.")
