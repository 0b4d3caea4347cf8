"""Targets: the value that, put at a site, makes the model say the new answer (MEMIT section 4.2, as its code does it).

For every request a δ is found that minimises

    mean over contexts of -log p(target) / tokens  +  kl_factor · KL(p_now ‖ p_before)  +  v_weight_decay · ‖δ‖ / ‖v‖²

where the KL is read at the subject's last token of the essence prompt "{} is a" and v is the value before. Adam; after
each step δ is pulled back to ‖δ‖ ≤ clamp_norm_factor · ‖v‖; a request stops at a loss below `stop_loss`. N steps are N
forwards and N-1 updates. Blocks below the lowest site run once: δ changes nothing there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..facts.fact import Fact, fill
from ..progress import Progress
from ..prompts import Batch, encode_ids, pad_id, target_ids, template_span, token_ids
from ..sites import Kind, Site
from .contexts import Contexts
from .keys import Position

if TYPE_CHECKING:
    from ..model import TracedModel

ESSENCE = "{} is a"


@dataclass(frozen=True)
class Objective:
    """How a target is searched for."""

    v_num_grad_steps: int = 25
    v_lr: float = 0.5
    v_weight_decay: float = 1e-3
    kl_factor: float = 0.0625
    clamp_norm_factor: float = 4.0
    stop_loss: float = 5e-2


class Targets(NamedTuple):
    """Wanted values per site, the values before, and how the search ended."""

    wanted: dict[Site, Float[Tensor, "fact d_model"]]
    before: dict[Site, Float[Tensor, "fact d_model"]]
    loss: Float[Tensor, " fact"]
    prob: Float[Tensor, " fact"]
    steps: Int[Tensor, " fact"]


class _Rows(NamedTuple):
    """Per request C context rows that end before the target's last token, then the essence row that ends at the
    subject. Padded on the left, so the last columns of every row are the ones whose logits are read."""

    batch: Batch
    columns: Int[Tensor, "fact row"]
    targets: Int[Tensor, "fact token"]
    target_mask: Bool[Tensor, "fact token"]


def find_targets(
    model: TracedModel,
    facts: Sequence[Fact],
    sites: Sequence[Site],
    contexts: Contexts,
    objective: Objective,
    position: Position = Position.SUBJECT_LAST,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Targets:
    """Optimise one δ a site and request, `sites` together, requests in independent batches."""
    parts = []
    for start in range(0, len(facts), batch_size):
        parts.append(_find_batch(model, facts[start : start + batch_size], sites, contexts, objective, position))
        if progress:
            progress(min(start + batch_size, len(facts)), len(facts))
    join = lambda name: {s: torch.cat([getattr(p, name)[s] for p in parts]) for s in sites}  # noqa: E731
    return Targets(join("wanted"), join("before"), *(torch.cat([p[i] for p in parts]) for i in (2, 3, 4)))


def _find_batch(
    model: TracedModel,
    facts: Sequence[Fact],
    sites: Sequence[Site],
    contexts: Contexts,
    objective: Objective,
    position: Position,
) -> Targets:
    rows = _rows(model, facts, contexts, position)
    start = min(s.layer + (s.kind is Kind.RESID) for s in sites)
    below, now = _run_below(model, rows, sites, start)
    delta = {s: torch.zeros_like(v, requires_grad=True) for s, v in now.items()}
    optimizer = torch.optim.Adam(delta.values(), lr=objective.v_lr)
    active = torch.ones(len(facts), dtype=torch.bool, device=model.device)
    steps = torch.zeros(len(facts), dtype=torch.long, device=model.device)
    essence_before: Tensor | None = None
    for step in range(objective.v_num_grad_steps):
        with torch.enable_grad():
            logits = _run_above(model, rows, below, start, delta)
            nll, essence = _losses(logits, rows)
            essence_before = essence.detach() if essence_before is None else essence_before
            kl = (essence.exp() * (essence - essence_before)).sum(-1)
            decay = sum((delta[s].norm(dim=-1) / now[s].norm(dim=-1) ** 2 for s in sites), torch.zeros(()))
            loss = nll.mean(-1) + objective.kl_factor * kl + objective.v_weight_decay * decay
        prob, last = (-nll).exp().mean(-1).detach(), loss.detach()
        active &= last >= objective.stop_loss
        if step == objective.v_num_grad_steps - 1 or not bool(active.any()):
            break
        optimizer.zero_grad()
        loss[active].sum().backward()
        kept = {s: d.detach().clone() for s, d in delta.items()}
        optimizer.step()
        steps += active
        with torch.no_grad():
            for s in sites:
                longest = objective.clamp_norm_factor * now[s].norm(dim=-1, keepdim=True)
                delta[s].mul_((longest / delta[s].norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1))
                delta[s].copy_(torch.where(active[:, None], delta[s], kept[s]))  # a request that is done stays
    wanted = {s: (now[s] + delta[s]).detach() for s in sites}
    return Targets(wanted, now, last, prob, steps)


def _rows(model: TracedModel, facts: Sequence[Fact], contexts: Contexts, position: Position) -> _Rows:
    tokenizer = model.tokenizer
    ids, at, answers = [], [], []
    for fact in facts:
        answer = target_ids(tokenizer, fact.prompt, fact.target or "")
        answers.append(answer)
        for template in contexts.templates(fact):
            prompt = token_ids(tokenizer, fill(template, fact.subject))
            last = len(prompt) - 1
            at.append(
                template_span(tokenizer, template, fact.subject).last if position is Position.SUBJECT_LAST else last
            )
            ids.append([*prompt, *answer[:-1]])
        essence_at = template_span(tokenizer, ESSENCE, fact.subject).last
        ids.append(token_ids(tokenizer, fill(ESSENCE, fact.subject))[: essence_at + 1])
        at.append(essence_at)
    batch = encode_ids(ids, pad_id(tokenizer))
    width = max(map(len, answers))
    targets = torch.zeros((len(facts), width), dtype=torch.long)
    for i, answer in enumerate(answers):
        targets[i, width - len(answer) :] = torch.tensor(answer)
    lengths = torch.tensor([len(a) for a in answers])
    mask = torch.arange(width)[None] >= width - lengths[:, None]
    columns = rearrange(batch.columns(at), "(fact row) -> fact row", fact=len(facts))
    device = model.device
    return _Rows(batch.to(device), columns.to(device), targets.to(device), mask.to(device))


@torch.no_grad()
def _run_below(
    model: TracedModel, rows: _Rows, sites: Sequence[Site], start: int
) -> tuple[Float[Tensor, "row pos d_model"], dict[Site, Float[Tensor, "fact d_model"]]]:
    """The residual stream that enters block `start`, and each site's value in the first context row."""
    first_row = torch.arange(len(rows.columns), device=model.device) * rows.columns.shape[1]
    column, size = rows.columns[:, 0], len(rows.batch)
    now: dict[Site, Tensor] = {}
    with model.nns.trace(**model.inputs(rows.batch)) as tracer:
        for layer in range(max(start, max(s.layer for s in sites) + 1)):
            if layer == start == 0:
                below = model.block(0).input.clone().save()
            for kind in (Kind.ATTN, Kind.MLP, Kind.RESID):
                if Site(kind, layer) in sites:
                    now[Site(kind, layer)] = model.value(Site(kind, layer), size)[first_row, column].float().save()
            if layer == start - 1:
                below = model.value(Site(Kind.RESID, layer), size).clone().save()
        tracer.stop()
    return below, {s: now[s] for s in sites}


def _run_above(
    model: TracedModel,
    rows: _Rows,
    below: Float[Tensor, "row pos d_model"],
    start: int,
    delta: dict[Site, Float[Tensor, "fact d_model"]],
) -> Float[Tensor, "fact row token vocab"]:
    """Logits of the last columns with δ added, from block `start` on."""
    size, columns = len(rows.batch), rearrange(rows.columns, "fact row -> (fact row)")
    number = torch.arange(size, device=model.device)
    contexts = rows.columns.shape[1]
    shift = {s: repeat(d, "fact d -> (fact row) d", row=contexts).to(below.dtype) for s, d in delta.items()}
    keep = rows.targets.shape[1]
    entering = below.clone()
    if Site(Kind.RESID, start - 1) in shift:
        entering = entering.index_put((number, columns), shift[Site(Kind.RESID, start - 1)], accumulate=True)
    filler = (entering, None) if model.layout.tuple_output else entering
    with model.nns.trace(**model.inputs(rows.batch, keep)):
        for layer in range(start):
            model.block(layer).skip(filler)
        if start == 0:
            model.block(0).input = entering
        for layer in range(start, model.n_layers):
            for kind in (Kind.ATTN, Kind.MLP):
                if Site(kind, layer) in shift:
                    model.value(Site(kind, layer), size)[number, columns] += shift[Site(kind, layer)]
            if Site(Kind.RESID, layer) in shift:
                model.value(Site(Kind.RESID, layer), size)[number, columns] += shift[Site(Kind.RESID, layer)]
        logits = model.nns.output.logits.save()
    return rearrange(logits[:, -keep:].float(), "(fact row) t v -> fact row t v", row=contexts)


def _losses(
    logits: Float[Tensor, "fact row token vocab"], rows: _Rows
) -> tuple[Float[Tensor, "fact context"], Float[Tensor, "fact vocab"]]:
    """Mean -log p of the target's tokens in every context row; log-probabilities at the essence row's subject."""
    logp = logits[:, :-1].log_softmax(-1)
    index = repeat(rows.targets, "fact token -> fact context token 1", context=logp.shape[1])
    picked = logp.gather(-1, index)[..., 0]
    lengths = rows.target_mask.sum(-1)
    nll = -(picked * rows.target_mask[:, None]).sum(-1) / lengths[:, None]
    return nll, logits[:, -1, -1].log_softmax(-1)
