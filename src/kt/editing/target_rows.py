"""The rows that a target search runs, and their two halves: blocks below the lowest aim once, the rest per step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..facts.fact import Fact, fill
from ..prompts import Batch, encode_ids, pad_id, target_ids, template_span, token_ids
from ..sites import Kind, Site
from .aims import Aim, Position
from .contexts import Contexts

if TYPE_CHECKING:
    from ..model import TracedModel

ESSENCE = "{} is a"


class TargetRows(NamedTuple):
    """Per request C context rows that end before the target's last token, then the essence row, which is cut at the
    subject's last token. Padded on the left, so the last columns of every row are the ones whose logits are read.

    `columns` gives each position's column per row; the prompt's last token does not stand in the essence row.
    """

    batch: Batch
    columns: dict[Position, Int[Tensor, "fact row"]]
    targets: Int[Tensor, "fact token"]
    target_mask: Bool[Tensor, "fact token"]

    @property
    def per_fact(self) -> int:
        return self.columns[Position.SUBJECT_LAST].shape[1]

    def where(self, position: Position) -> tuple[Int[Tensor, " row"], Int[Tensor, " row"]]:
        """(row, column) of every place that δ of this position is added to."""
        rows = torch.arange(len(self.batch), device=self.batch.ids.device)
        columns = rearrange(self.columns[position], "fact row -> (fact row)")
        if position is Position.PROMPT_LAST:
            kept = (rows + 1) % self.per_fact != 0
            return rows[kept], columns[kept]
        return rows, columns


def target_rows(model: TracedModel, facts: Sequence[Fact], contexts: Contexts) -> TargetRows:
    tokenizer = model.tokenizer
    ids, answers = [], []
    at: dict[Position, list[int]] = {position: [] for position in Position}
    for fact in facts:
        answer = target_ids(tokenizer, fact.prompt, fact.target or "")
        answers.append(answer)
        for template in contexts.templates(fact):
            prompt = token_ids(tokenizer, fill(template, fact.subject))
            at[Position.SUBJECT_LAST].append(template_span(tokenizer, template, fact.subject).last)
            at[Position.PROMPT_LAST].append(len(prompt) - 1)
            ids.append([*prompt, *answer[:-1]])
        essence_at = template_span(tokenizer, ESSENCE, fact.subject).last
        ids.append(token_ids(tokenizer, fill(ESSENCE, fact.subject))[: essence_at + 1])
        for places in at.values():
            places.append(essence_at)
    batch = encode_ids(ids, pad_id(tokenizer))
    targets, mask = _right_aligned(answers)
    device = model.device
    columns = {p: rearrange(batch.columns(c), "(fact row) -> fact row", fact=len(facts)) for p, c in at.items()}
    return TargetRows(
        batch.to(device), {p: c.to(device) for p, c in columns.items()}, targets.to(device), mask.to(device)
    )


def _right_aligned(answers: Sequence[tuple[int, ...]]) -> tuple[Int[Tensor, "fact token"], Bool[Tensor, "fact token"]]:
    width = max(map(len, answers))
    targets = torch.zeros((len(answers), width), dtype=torch.long)
    for i, answer in enumerate(answers):
        targets[i, width - len(answer) :] = torch.tensor(answer)
    lengths = torch.tensor([len(a) for a in answers])
    return targets, torch.arange(width)[None] >= width - lengths[:, None]


@torch.no_grad()
def run_below(
    model: TracedModel, rows: TargetRows, aims: Sequence[Aim], start: int
) -> tuple[Float[Tensor, "row pos d_model"], dict[Aim, Float[Tensor, "fact d_model"]]]:
    """The residual stream that enters block `start`, and each aim's value in the first (bare) context row."""
    bare = torch.arange(len(rows.targets), device=model.device) * rows.per_fact
    size = len(rows.batch)
    now: dict[Aim, Tensor] = {}
    with model.nns.trace(**model.inputs(rows.batch)) as tracer:
        for layer in range(max(start, max(a.site.layer for a in aims) + 1)):
            if layer == start == 0:
                below = model.block(0).input.clone().save()
            for kind in (Kind.ATTN, Kind.MLP, Kind.RESID):
                for aim in aims:
                    if aim.site == Site(kind, layer):
                        column = rows.columns[aim.position][:, 0]
                        value: Any = model.value(aim.site, size)[bare, column].float()
                        now[aim] = value.save()
            if layer == start - 1:
                entering: Any = model.value(Site(Kind.RESID, layer), size).clone()
                below = entering.save()
        tracer.stop()
    return below, {a: now[a] for a in aims}


def run_above(
    model: TracedModel,
    rows: TargetRows,
    below: Float[Tensor, "row pos d_model"],
    start: int,
    delta: dict[Aim, Float[Tensor, "fact d_model"]],
) -> Float[Tensor, "fact row token vocab"]:
    """Logits of the last columns with every δ added at its aim, from block `start` on."""
    size, keep = len(rows.batch), rows.targets.shape[1]
    shifts = {a: _shift(rows, a, d, below.dtype) for a, d in delta.items()}
    entering = below.clone()
    for aim, (where, shift) in shifts.items():
        if aim.site == Site(Kind.RESID, start - 1):
            entering = entering.index_put(where, shift, accumulate=True)
    filler = (entering, None) if model.layout.tuple_output else entering
    with model.nns.trace(**model.inputs(rows.batch, keep)):
        for layer in range(start):
            model.block(layer).skip(filler)
        if start == 0:
            model.block(0).input = entering
        for layer in range(start, model.n_layers):
            for kind in (Kind.ATTN, Kind.MLP, Kind.RESID):
                for aim, (where, shift) in shifts.items():
                    if aim.site == Site(kind, layer):
                        model.value(aim.site, size)[where] += shift
        logits = model.last_logits(keep).save()
    return rearrange(logits.float(), "(fact row) t v -> fact row t v", row=rows.per_fact)


def _shift(
    rows: TargetRows, aim: Aim, delta: Float[Tensor, "fact d_model"], dtype: torch.dtype
) -> tuple[tuple, Tensor]:
    where = rows.where(aim.position)
    each = repeat(delta, "fact d -> (fact row) d", row=rows.per_fact)
    return where, each[where[0]].to(dtype)
