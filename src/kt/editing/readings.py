"""What a model says of each request's target and old answer: probability and rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from ..facts.fact import Fact
from ..prompts import encode_ids, pad_id, target_ids, token_ids
from .edit import RequestReport

if TYPE_CHECKING:
    from ..model import TracedModel


class Said(NamedTuple):
    """An answer's joint probability, teacher-forced, and the rank of its first token."""

    prob: float
    rank: int


class Reading(NamedTuple):
    """What the model says of a fact's target and old answer."""

    target: Said
    answer: Said | None


def readings(model: TracedModel, facts: list[Fact]) -> list[Reading]:
    asked = [(f.prompt, f.target or "") for f in facts] + [(f.prompt, f.answer) for f in facts if f.answer]
    read = iter(_probability_and_rank(model, [(p, str(a)) for p, a in asked]))
    targets = [next(read) for _ in facts]
    return [Reading(t, next(read) if f.answer else None) for t, f in zip(targets, facts, strict=True)]


def _probability_and_rank(model: TracedModel, asked: list[tuple[str, str]]) -> list[Said]:
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
            out.append(Said(float(joint), int((own[0] > own[0, answer_ids[0]]).sum())))
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
