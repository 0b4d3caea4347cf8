"""What rounding to 16 bits leaves of an update, and which requests it costs.

A weight W of 16 bits becomes W' = round(W + ΔW), so what was written is W' - W and not ΔW. Per weight

    survived = <W' - W, ΔW> / ‖ΔW‖²      (1: all of it; 0: nothing, every entry was rounded back)
    error    = ‖(W' - W) - ΔW‖ / ‖ΔW‖    (0: exact; 1: as if nothing had been written)

A request is lost to rounding where every token of its target is the argmax under the unrounded update, but not under
the written weights. The unrounded reading is a forward of the written model in which every edited projection's value
gets (ΔW - (W' - W)) k added, in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UnknownSite
from ..facts.fact import Fact
from ..model.sites import Site
from ..model.tokens import Batch, encode_ids, pad_id, target_ids, token_ids
from ..model.update import Dense, LowRank, Update
from .request_report import RequestReport

if TYPE_CHECKING:
    from ..model.model import TracedModel
    from .edit import Edit


NUMBERS_PER_BLOCK = 2**22
ROWS_PER_FORWARD = 32
WORTH_SAYING = 0.9
"""An update of which less survives is warned of."""


class Wanted(NamedTuple):
    """Some rows of a weight: what they were to change by, and what they did change by, float64."""

    rows: slice
    asked: Float[Tensor, "row d_in"]
    got: Float[Tensor, "row d_in"]


@dataclass(frozen=True)
class Rounded:
    """A written weight beside its bytes from before and its update, seen as (d_out, d_in) (a bias as one row)."""

    now: Float[Tensor, "d_out d_in"]
    before: Float[Tensor, "d_out d_in"]
    update: Update

    @classmethod
    def of(cls, model: TracedModel, name: str, before: Tensor, update: Update) -> Rounded:
        """`before` is the parameter's own copy, in the module's orientation."""
        now = model.weight(name)
        before = before.as_strided(now.shape, now.stride())
        return cls(now, before, update) if now.dim() == 2 else cls(now[None], before[None], update)

    def blocks(self) -> Iterator[Wanted]:
        """The rows in blocks: nothing as large as the weight is made."""
        step = max(1, NUMBERS_PER_BLOCK // self.now.shape[1])
        for start in range(0, len(self.now), step):
            rows = slice(start, start + step)
            asked = _rows(self.update, rows, self.now.shape).to(self.now.device, torch.float64)
            yield Wanted(rows, asked, self.now[rows].double() - self.before[rows].double())

    def measure(self) -> dict[str, float | None]:
        """`survived` and `error` (see the module); None of an update that is zero."""
        along = asked = missed = 0.0
        for block in self.blocks():
            along += float((block.got * block.asked).sum())
            asked += float(block.asked.square().sum())
            missed += float((block.got - block.asked).square().sum())
        if not asked:
            return {"survived": None, "error": None}
        return {"survived": along / asked, "error": (missed / asked) ** 0.5}

    def missing(self, keys: Float[Tensor, "row pos d_in"]) -> Float[Tensor, "row pos d_out"]:
        """What rounding took from the values of these keys, float32."""
        keys = keys.float()
        parts = [keys @ (block.asked - block.got).float().T for block in self.blocks()]
        return torch.cat(parts, dim=-1)


def is_narrow(weight: Tensor) -> bool:
    """Of 16 bits or fewer: an update is rounded when it is written."""
    return weight.element_size() < 4


def about_rounding(
    model: TracedModel, edit: Edit, before: Mapping[str, Tensor], facts: Sequence[Fact]
) -> dict[str, Any]:
    """For the manifest, of an edit that is written into the model: `rounding` by weight and `lost_to_rounding`, the
    requests' ids (None where a weight other than W_o and down_proj was rounded, whose values are not read).

    Args:
        before: the narrow weights' own bytes from before the write; the others are exact and left out.
    """
    if not before:
        return {}
    rounded = {n: Rounded.of(model, n, held, edit.updates[n]) for n, held in before.items()}
    found = {name: weight.measure() for name, weight in rounded.items()}
    sites = {_site(model, name): weight for name, weight in rounded.items()}
    lost: list[str] | None = None
    if None not in sites:
        known = {site: weight for site, weight in sites.items() if site is not None}
        said, unrounded = (said_in_full(model, facts, held) for held in ({}, known))
        lost = [fact.id for fact, now, wanted in zip(facts, said, unrounded, strict=True) if wanted and not now]
    return {"rounding": found, "lost_to_rounding": lost}


@torch.no_grad()
def logits_given_back(
    model: TracedModel, batch: Batch, keep: int, rounded: Mapping[Site, Rounded]
) -> Float[Tensor, "row keep vocab"]:
    """Logits of the last `keep` positions, with what rounding took from these sites' values given back."""
    size = len(batch)
    with model.nnsight.trace(**model.inputs(batch, keep)):
        for site in model.in_order(rounded):
            missing: Any = rounded[site].missing(model.key(site, size))
            value: Any = model.value(site, size)
            value[:] = (value.float() + missing).to(value.dtype)
        logits = model.last_logits(keep).save()
    return logits.float()


def said_in_full(model: TracedModel, facts: Sequence[Fact], rounded: Mapping[Site, Rounded]) -> list[bool]:
    """Whether every token of a fact's target is the argmax where it is due, with what rounding took given back."""
    said: list[bool] = []
    for start in range(0, len(facts), ROWS_PER_FORWARD):
        part = facts[start : start + ROWS_PER_FORWARD]
        prompts = [token_ids(model.tokenizer, fact.prompt) for fact in part]
        answers = [target_ids(model.tokenizer, fact.prompt, fact.target or "") for fact in part]
        batch = encode_ids([[*p, *a[:-1]] for p, a in zip(prompts, answers, strict=True)], pad_id(model.tokenizer))
        logits = logits_given_back(model, batch, max(map(len, answers)), rounded)
        for row, answer in zip(logits, answers, strict=True):
            own = row[-len(answer) :]
            due = own[torch.arange(len(answer)), list(answer)]
            said.append(bool((due >= own.amax(-1)).all()))
    return said


def warn_of_rounding(edit: Edit, dtype: torch.dtype) -> None:
    """One line where much of an update was rounded away, or a request with it."""
    rounding, lost = edit.manifest.get("rounding", {}), edit.manifest.get("lost_to_rounding") or []
    kept = {name: found["survived"] for name, found in rounding.items() if found["survived"] is not None}
    worst = min(kept, key=lambda name: kept[name], default=None)
    said = []
    if worst is not None and kept[worst] < WORTH_SAYING:
        said.append(f"left {kept[worst]:.0%} of the update of {worst} (the least of {len(kept)} weights)")
    if lost:
        shown = ", ".join(map(repr, lost[:3])) + (", ..." if len(lost) > 3 else "")
        said.append(f"costs {len(lost)} of {len(edit.requests)} requests (ids {shown})")
    if said:
        what = f"rounding to {str(dtype).removeprefix('torch.')}"
        warnings.warn(f"{what} {' and '.join(said)}; load the model with --dtype float32", stacklevel=5)


def _rows(update: Update, rows: slice, shape: Sequence[int]) -> Float[Tensor, "row d_in"]:
    """Rows of the dense update, as `Edit.delta` has them: float32."""
    if isinstance(update, LowRank):
        return (update.left[rows].double() @ update.right.double()).float()
    assert isinstance(update, Dense)
    return update.matrix.reshape(tuple(shape))[rows].float()


def _site(model: TracedModel, name: str) -> Site | None:
    try:
        return model.site_of(name) if name.endswith(".weight") else None
    except UnknownSite:
        return None


# What a model says of each request's target and old answer: probability and rank.


class AnswerProbs(NamedTuple):
    """An answer's joint probability, teacher-forced, and the rank of its first token."""

    prob: float
    rank: int


class Reading(NamedTuple):
    """What the model says of a fact's target and old answer."""

    target: AnswerProbs
    answer: AnswerProbs | None


def readings(model: TracedModel, facts: list[Fact]) -> list[Reading]:
    asked = [(f.prompt, f.target or "") for f in facts] + [(f.prompt, f.answer) for f in facts if f.answer]
    read = iter(_probability_and_rank(model, [(p, str(a)) for p, a in asked]))
    targets = [next(read) for _ in facts]
    return [Reading(t, next(read) if f.answer else None) for t, f in zip(targets, facts, strict=True)]


def _probability_and_rank(model: TracedModel, asked: list[tuple[str, str]]) -> list[AnswerProbs]:
    out = []
    for start in range(0, len(asked), 32):
        part = [
            (token_ids(model.tokenizer, p), target_ids(model.tokenizer, p, a)) for p, a in asked[start : start + 32]
        ]
        width = max(len(a) for _, a in part)
        batch = encode_ids([[*p, *a[:-1]] for p, a in part], pad_id(model.tokenizer))
        logits = model.logits(batch, keep=width)
        for row, (_, answer) in zip(logits, part, strict=True):
            answer_ids = torch.tensor(answer, device=row.device)
            own = row[-len(answer) :]
            joint = own.log_softmax(-1)[torch.arange(len(answer)), answer_ids].sum().exp()
            out.append(AnswerProbs(float(joint), int((own[0] > own[0, answer_ids[0]]).sum())))
    return out


def report(fact: Fact, before: Reading, after: Reading, control: Reading | None = None) -> RequestReport:
    old = (before.answer, after.answer)
    return RequestReport(
        fact.id,
        fact.prompt,
        fact.subject,
        fact.target or "",
        fact.answer,
        target_prob=(before.target.prob, after.target.prob),
        target_rank=(before.target.rank, after.target.rank),
        answer_prob=None if old[0] is None or old[1] is None else (old[0].prob, old[1].prob),
        answer_rank=None if old[0] is None or old[1] is None else (old[0].rank, old[1].rank),
        control_prob=None if control is None else control.target.prob,
    )
