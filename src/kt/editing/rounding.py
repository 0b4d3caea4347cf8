"""The share of an update that survives rounding to 16 bits, and the requests that rounding costs.

A weight W of 16 bits becomes W' = round(W + ΔW), so the written update is W' - W and not ΔW. Per weight

    survived = <W' - W, ΔW> / ‖ΔW‖²      (1: all of it; 0: nothing, every entry was rounded back)
    error    = ‖(W' - W) - ΔW‖ / ‖ΔW‖    (0: exact; 1: as if nothing had been written)

A request is lost to rounding where every token of its target is the argmax under the unrounded update, but not under
the written weights. The unrounded reading is a forward of the written model in which every edited projection's value
gets (ΔW - (W' - W)) k added, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .._util.text import some_of
from ..errors import UnknownSite, warn_user
from ..facts.fact import Fact
from ..model.effects import rendered
from ..model.scoring import Forward, Question, TeacherForced, answer_row, first_tokens, teacher_force, warn_of_joins
from ..model.sites import Site
from ..model.tokens import Batch, token_ids
from ..model.update import Dense, LowRank, Update
from ..runs import parallel
from .request_report import LEAST, RequestReport

if TYPE_CHECKING:
    from ..model.model import TracedModel
    from .edit import Edit


NUMBERS_PER_BLOCK = 2**22
SMALL = 32
"""Answers that are scored in one forward."""
WARN_BELOW = 0.9
"""An update of which a smaller share survives gets a warning."""


class UpdateRows(NamedTuple):
    """Rows of a weight: the update as it was solved, and as it was written, float64."""

    solved: Float[Tensor, "row d_in"]
    written: Float[Tensor, "row d_in"]


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

    def blocks(self) -> Iterator[UpdateRows]:
        """The rows in blocks, so that nothing as large as the weight is allocated."""
        step = max(1, NUMBERS_PER_BLOCK // self.now.shape[1])
        for start in range(0, len(self.now), step):
            rows = slice(start, start + step)
            solved = _rows(self.update, rows, self.now.shape).to(self.now.device, torch.float64)
            yield UpdateRows(solved, self.now[rows].double() - self.before[rows].double())

    def measure(self) -> dict[str, float | None]:
        """`survived` and `error` (see the module); None for an update that is zero."""
        along = norm = missed = 0.0
        for block in self.blocks():
            along += float((block.written * block.solved).sum())
            norm += float(block.solved.square().sum())
            missed += float((block.written - block.solved).square().sum())
        if not norm:
            return {"survived": None, "error": None}
        return {"survived": along / norm, "error": (missed / norm) ** 0.5}

    def missing(self, keys: Float[Tensor, "row pos d_in"]) -> Float[Tensor, "row pos d_out"]:
        """The part of these keys' values that rounding took away, float32."""
        keys = keys.float()
        parts = [keys @ (block.solved - block.written).float().T for block in self.blocks()]
        return torch.cat(parts, dim=-1)


def is_narrow(weight: Tensor) -> bool:
    """Whether the weight has 16 bits or fewer, so that an update is rounded when it is written."""
    return weight.element_size() < 4


def about_rounding(
    model: TracedModel, edit: Edit, before: Mapping[str, Tensor], facts: Sequence[Fact]
) -> dict[str, Any]:
    """The manifest's `rounding`, by weight, and `lost_to_rounding`, the ids of the requests that rounding costs.

    `lost_to_rounding` is None where a weight other than W_o and down_proj was rounded, whose values are not read.

    Args:
        model: with the edit written into it.
        before: the narrow weights' own bytes from before the write; the others are exact and left out.
    """
    if not before:
        return {}
    rounded = {name: Rounded.of(model, name, old, edit.updates[name]) for name, old in before.items()}
    sites = {_site(model, name): weight for name, weight in rounded.items()}
    lost: list[str] | None = None
    if None not in sites:
        known = {site: weight for site, weight in sites.items() if site is not None}
        written, unrounded = (says_targets(model, facts, restored) for restored in ({}, known))
        lost = [fact.id for fact, now, full in zip(facts, written, unrounded, strict=True) if full and not now]
    return {"rounding": {name: weight.measure() for name, weight in rounded.items()}, "lost_to_rounding": lost}


@torch.no_grad()
def logits_given_back(
    model: TracedModel, batch: Batch, keep: int, rounded: Mapping[Site, Rounded]
) -> Float[Tensor, "row keep vocab"]:
    """Logits of the last `keep` positions, with the part that rounding took added to these sites' values."""
    size = len(batch)
    with model.nnsight.trace(**model.inputs(batch, keep)):
        for site in model.in_order(rounded):
            missing: Any = rounded[site].missing(model.key(site, size))
            value: Any = model.value(site, size)
            value[:] = (value.float() + missing).to(value.dtype)
        logits = model.last_logits(keep).save()
    return logits.float()


def says_targets(model: TracedModel, facts: Sequence[Fact], rounded: Mapping[Site, Rounded]) -> list[bool]:
    """Whether every token of a fact's target is the argmax at its position; see `logits_given_back`."""
    scores = target_scores(model, facts, lambda batch, keep: logits_given_back(model, batch, keep, rounded))
    return [bool(score.is_greedy) for score in scores]


def warn_of_rounding(edit: Edit, dtype: torch.dtype) -> None:
    """Warn, in one line, where much of an update was rounded away, or a request with it."""
    rounding, lost = edit.manifest.get("rounding", {}), edit.manifest.get("lost_to_rounding") or []
    survived = {name: share["survived"] for name, share in rounding.items() if share["survived"] is not None}
    worst = min(survived, key=lambda name: survived[name], default=None)
    losses = []
    if worst is not None and survived[worst] < WARN_BELOW:
        losses.append(f"left {survived[worst]:.0%} of the update of {worst} (the least of {len(survived)} weights)")
    if lost:
        shown = some_of(list(map(repr, lost)), rest=", ...")
        losses.append(f"costs {len(lost)} of {len(edit.requests)} requests (ids {shown})")
    if losses:
        what = f"rounding to {str(dtype).removeprefix('torch.')}"
        warn_user(f"{what} {' and '.join(losses)}; load the model with --dtype float32")


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


class AnswerProbs(NamedTuple):
    """An answer's joint probability, teacher-forced, its natural logarithm, and the rank of its first token."""

    prob: float
    rank: int
    log_prob: float


class Reading(NamedTuple):
    """The scores of a fact's target and of its old answer, if it has one."""

    target: AnswerProbs
    answer: AnswerProbs | None


def readings(model: TracedModel, facts: Sequence[Fact], unedited: bool = False) -> list[Reading]:
    """The probability and rank of every fact's target and, where it has one, of its old answer; NaN where those are.

    An `unedited` model is also asked whether answers are joined to their prompts as it expects; a warning says if not.
    """
    targets = [_asked(fact, fact.target or "") for fact in facts]
    answers: list[Question | None] = [_asked(fact, fact.answer) if fact.answer else None for fact in facts]
    scored = _scores(model, [*targets, *(asked for asked in answers if asked is not None)])
    if unedited:
        warn_of_joins(first_tokens(scored))
    scores = {
        question: AnswerProbs(math.exp(score.log_prob or 0.0), score.first_rank or 0, score.log_prob or 0.0)
        for question, score in scored.items()
    }
    return [Reading(scores[t], scores[a] if a else None) for t, a in zip(targets, answers, strict=True)]


def _asked(fact: Fact, answer: str) -> Question:
    return (fact.prompt, answer) if fact.target_prefix is None else (fact.prompt, answer, fact.target_prefix)


def target_scores(model: TracedModel, facts: Sequence[Fact], forward: Forward | None = None) -> list[TeacherForced]:
    """Every fact's target, teacher-forced; see `_scores`."""
    questions = [_asked(fact, fact.target or "") for fact in facts]
    scores = _scores(model, questions, forward)
    return [scores[question] for question in questions]


def _scores(
    model: TracedModel, questions: Sequence[Question], forward: Forward | None = None
) -> dict[Question, TeacherForced]:
    """Scores of answers behind their prompts' own tokens. Every process of a run computes all of them."""
    rows = []
    for question in dict.fromkeys(questions):
        row = answer_row(model, question)
        rows.append(row._replace(read=(*token_ids(model.reader, rendered(model, question[0])), *row.target[:-1])))
    with parallel.alone():
        # A second forward for shared prompts costs a small batch more than it saves.
        return teacher_force(model, rows, share_prefixes=len(rows) > SMALL, ranks=True, forward=forward, allow_nan=True)


def about_log_probs(before: Sequence[Reading], after: Sequence[Reading]) -> list[dict[str, list[float]]] | None:
    """The manifest's `log_probs`: by request, those of target and old answer before and after where one of the two
    probabilities is below what a float holds; None where none is."""
    rows = []
    for pair in zip(before, after, strict=True):
        both = {name: [getattr(each, name) for each in pair] for name in ("target", "answer")}
        logs = {name: [each.log_prob for each in read] for name, read in both.items() if None not in read}
        rows.append({name: values for name, values in logs.items() if -math.inf < min(values) < LEAST})
    return rows if any(rows) else None


def report(fact: Fact, before: Reading, after: Reading, control: Reading | None = None) -> RequestReport:
    """One request before and after the edit, and its target under the edit's control."""
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
