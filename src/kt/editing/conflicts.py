"""Conflicts of new requests with earlier edits, found before anything is solved.

Two questions, of every request of an earlier edit and every new one:

- Do they speak of one fact: the same subject, and the same relation (or the same template)?
- Would the new prompt read what the earlier request wrote? A closed form writes ΔW = Σ_j r_j u_jᵀ, a column a fact (of
  MEMIT eq. 14, u_j is the j-th row of Kᵀ(λC + K Kᵀ)⁻¹), so at a key k the share of fact j's part that is read is

      overlap(j, k) = u_jᵀ k / u_jᵀ k_j

  1 where k is fact j's own key, 0 where nothing of it is read. It is the mean over the edit's weights, each of which
  writes its part; keys are the edit's own kind (its context templates, its token), read from the model as it stands.
  An update that is kept dense has no columns: there the cosine of the keys stands in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import KtError
from ..facts.fact import Fact
from ..model.update import LowRank
from .closed_form.aims import Position
from .closed_form.contexts import Contexts
from .closed_form.keys import fact_keys
from .closed_form.plan import LocateThenEdit
from .edit import Edit
from .methods import METHODS
from .resolve import read_requests
from .stack import facts_of

if TYPE_CHECKING:
    from ..model.model import TracedModel


OVERLAP = 0.5
"""The least overlap that is shown. On the demo model fewer than 2 in 1000 pairs of facts of other relations reach it,
and more than 9 in 10 pairs with one subject, in two wordings or two relations (docs/data/stacks.md)."""
COSINE = 0.6
"""The least cosine of keys that is shown, measured in the same way."""


@dataclass(frozen=True)
class Conflict:
    """A new request against one of an earlier edit.

    `what`: `target` (one fact, two targets), `same` (one fact, the same target: it is there already) or `keys` (the new
    prompt reads what the earlier request wrote). `overlap` is None where the earlier edit has no keys; `measure` says
    whether it is an `overlap` or a `cosine`. `edit` counts from 1, in the order given.
    """

    what: str
    request: str
    prompt: str
    target: str
    edit: int
    earlier: str
    earlier_prompt: str
    earlier_target: str
    overlap: float | None = None
    measure: str | None = None


class Overlaps(NamedTuple):
    """The share of an earlier edit's requests that new ones read, as an `overlap` or a `cosine`; of an adapter `radii`,
    the sum of two radii over the distance of their keys, from 1 on."""

    values: Float[Tensor, "new old"]
    measure: str


def conflicts(
    model: TracedModel,
    requests: Sequence[Fact | Mapping[str, Any]],
    edits: Sequence[Edit],
    overlap: float = OVERLAP,
    cosine: float = COSINE,
) -> list[Conflict]:
    """Conflicts of new requests with earlier edits, by edit, then by request. Nothing is written.

    Args:
        edits: in the order in which they are applied.
        overlap: the least |overlap| that makes a conflict.
        cosine: the least |cosine| that does, where an edit's updates are dense.

    Raises:
        BadFact, SubjectNotFound: a request that cannot be edited as it stands.
        UnknownSite: an edit writes a weight that the model does not have.
    """
    new = read_requests(model, requests)
    least = {"overlap": overlap, "cosine": cosine, "radii": 1.0}
    met = []
    for number, edit in enumerate(edits, start=1):
        old = facts_of([edit])
        read = overlaps(model, new, edit)
        for i, fact in enumerate(new):
            for j, earlier in enumerate(old):
                value = None if read is None else float(read.values[i, j])
                close = read is not None and value is not None and abs(value) >= least[read.measure]
                if (what := same_fact(fact, earlier) or ("keys" if close else None)) is not None:
                    measure = None if read is None else read.measure
                    met.append(Conflict(what, *_side(fact), number, *_side(earlier), value, measure))
    return met


def same_fact(new: Fact, old: Fact) -> str | None:
    """`target` or `same` if two requests are about one fact; else None.

    One fact is one subject and one relation: by name where both have one, else the same template. Case, spaces and a
    question or full stop at the end do not count.
    """
    if _plain(new.subject) != _plain(old.subject):
        return None
    named = bool(new.relation and old.relation)
    if _plain(new.template) != _plain(old.template) and not (named and new.relation == old.relation):
        return None
    return "same" if _plain(new.target or "") == _plain(old.target or "") else "target"


def overlaps(model: TracedModel, new: Sequence[Fact], edit: Edit) -> Overlaps | None:
    """The share of each request of an edit that each new one reads; None without keys (fine-tuning has none)."""
    old = facts_of([edit])
    if edit.effect is not None:
        reach = edit.effect.overlaps(model, new)
        return None if reach is None else Overlaps(reach, "radii")
    tokens = positions(model, edit)
    if not tokens:
        return None
    contexts = Contexts.of(edit.manifest.get("context_templates") or [["{}"]])
    # PRUNE's columns are singular vectors, and NSE's are a pass's: only one a request is that request's.
    own = edit.manifest.get("update_guard") != "prune" and edit.manifest.get("method") != "nse"
    updates = [edit.updates[name] for name in tokens]
    columns = own and all(update.rank == len(old) and isinstance(update, LowRank) for update in updates)
    total = torch.zeros(len(new), len(old), dtype=torch.float64)
    for name, position in tokens.items():
        keys = fact_keys(model, [*new, *old], contexts, model.site_of(name), position).cpu()
        new_keys, old_keys = keys[:, : len(new)], keys[:, len(new) :]
        update = edit.updates[name]
        if columns and isinstance(update, LowRank):
            total += _shares(update.right.double().cpu(), new_keys, old_keys)
        else:
            unit = torch.nn.functional.normalize
            total += unit(new_keys, dim=0).T @ unit(old_keys, dim=0)
    return Overlaps(total / len(tokens), "overlap" if columns else "cosine")


def _shares(
    directions: Float[Tensor, "old d_in"], new_keys: Float[Tensor, "d_in new"], old_keys: Float[Tensor, "d_in old"]
) -> Float[Tensor, "new old"]:
    """u_jᵀ k_i / u_jᵀ k_j; a fact whose own key reads nothing of its part has no share to give."""
    written = (directions * old_keys.T).sum(1)
    return torch.where(written != 0, (directions @ new_keys).T / written, torch.zeros(()))


def positions(model: TracedModel, edit: Edit) -> dict[str, Position]:
    """By weight that has keys, the token at which the edit's method reads them."""
    read: dict[str, Position] = {}
    config, settings = METHODS.get(str(edit.manifest.get("method"))), edit.manifest.get("hyper_parameters", {})
    if config is not None:
        try:
            plan = config.of(settings).plan()
            paths = plan.live if isinstance(plan, LocateThenEdit) else []
            written = [(model.weight_name(site), path.aim.position) for path in paths for site in path.sites]
            read = {part: position for name, position in written for part in model.weight_names(name)}
        except (TypeError, ValueError, LookupError, KtError):
            read = {}  # settings of another version, or made up: at the subject's last token, as all methods but one
    return {name: read.get(name, Position.SUBJECT_LAST) for name in edit.names if name in edit.keys}


def _side(fact: Fact) -> tuple[str, str, str]:
    return fact.id, fact.prompt, fact.target or ""


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".?!: ").casefold()
