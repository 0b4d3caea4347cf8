"""Targets: the value that, put at a site, makes the model say the new answer (MEMIT section 4.2, as its code does it).

For every request a δ per aim is found, all aims of a search together, that minimises

    mean over contexts of -log p(target) / tokens  +  kl_factor · KL(p_now ‖ p_before)  +  Σ decay · ‖δ‖ / ‖v‖²

where the KL is read at the subject's last token of the essence prompt "{} is a" and v is the value before. Adam; after
each step δ is pulled back to ‖δ‖ ≤ clamp · ‖v‖; a request stops by the objective's rule. N steps are N forwards and
N-1 updates. Blocks below the lowest aim run once: δ changes nothing there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..facts.fact import Fact
from ..journal import Journal
from ..progress import Progress
from ..sites import Kind
from .aims import Aim, Objective
from .contexts import Contexts
from .target_rows import TargetRows, run_above, run_below, target_rows

if TYPE_CHECKING:
    from ..model import TracedModel


class Targets(NamedTuple):
    """Wanted values per aim, the values before, and how the search ended."""

    wanted: dict[Aim, Float[Tensor, "fact d_model"]]
    before: dict[Aim, Float[Tensor, "fact d_model"]]
    loss: Float[Tensor, " fact"]
    prob: Float[Tensor, " fact"]
    steps: Int[Tensor, " fact"]


def find_targets(
    model: TracedModel,
    facts: Sequence[Fact],
    aims: Sequence[Aim],
    contexts: Contexts,
    objective: Objective,
    batch_size: int = 16,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> Targets:
    """One δ an aim and request, `aims` searched together; requests in independent batches, each a journal's phase."""
    journal, parts = journal or Journal(), []
    for start in range(0, len(facts), batch_size):
        name, batch = f"targets-{'+'.join(map(str, aims))}-{start:05d}", facts[start : start + batch_size]
        found = journal.take(name, _find_batch, model, batch, aims, contexts, objective)
        parts.append(_targets(found, aims, model.device))
        if progress:
            progress(min(start + batch_size, len(facts)), len(facts))
    return join_targets(parts)


def _targets(held: Mapping[str, Any], aims: Sequence[Aim], device: torch.device) -> Targets:
    """From what `_find_batch` gave, with values by the aim's place."""
    wanted, before = ({a: v.to(device) for a, v in zip(aims, held[part], strict=True)} for part in ("wanted", "before"))
    return Targets(wanted, before, *(held[part].to(device) for part in ("loss", "prob", "steps")))


def join_targets(parts: Sequence[Targets]) -> Targets:
    """Searches over some facts and then others as one."""
    return Targets(
        {a: torch.cat([p.wanted[a] for p in parts]) for a in parts[0].wanted},
        {a: torch.cat([p.before[a] for p in parts]) for a in parts[0].before},
        torch.cat([p.loss for p in parts]),
        torch.cat([p.prob for p in parts]),
        torch.cat([p.steps for p in parts]),
    )


def _find_batch(
    model: TracedModel, facts: Sequence[Fact], aims: Sequence[Aim], contexts: Contexts, objective: Objective
) -> dict[str, Any]:
    """The fields of `Targets`, as a journal keeps them."""
    rows = target_rows(model, facts, contexts)
    start = min(a.site.layer + (a.site.kind is Kind.RESID) for a in aims)
    below, now = run_below(model, rows, aims, start)
    delta = {a: torch.zeros_like(v, requires_grad=True) for a, v in now.items()}
    optimizer = torch.optim.Adam(delta.values(), lr=objective.v_lr)
    active = torch.ones(len(facts), dtype=torch.bool, device=model.device)
    steps = torch.zeros(len(facts), dtype=torch.long, device=model.device)
    weight = torch.ones(len(facts), device=model.device)
    essence_before: Tensor | None = None
    for step in range(objective.v_num_grad_steps):
        with torch.enable_grad():
            read = _read(run_above(model, rows, below, start, delta), rows)
            essence_before = read.essence.detach() if essence_before is None else essence_before
            kl = objective.kl_factor * (read.essence.exp() * (read.essence - essence_before)).sum(-1)
            decay = sum(_decay(a, objective) * _relative(delta[a], now[a]) for a in aims)
            loss = weight * read.nll.mean(-1) + kl + decay
        prob, last = (-read.nll).exp().mean(-1).detach(), loss.detach()
        active &= ~_done(read, last, prob, kl.detach(), objective)
        if objective.argmax_discount:
            weight = torch.where(read.all_argmax, 0.1, 1.0)
        if step == objective.v_num_grad_steps - 1 or not bool(active.any()):
            break
        optimizer.zero_grad()
        loss[active].sum().backward()
        _step(optimizer, delta, now, active, objective)
        steps += active
    wanted, before = [(now[a] + delta[a]).detach() for a in aims], [now[a] for a in aims]
    return {"wanted": wanted, "before": before, "loss": last, "prob": prob, "steps": steps}


class _Reading(NamedTuple):
    """What a forward says of every request."""

    nll: Float[Tensor, "fact context"]
    essence: Float[Tensor, "fact vocab"]
    all_argmax: Bool[Tensor, " fact"]


def _read(logits: Float[Tensor, "fact row token vocab"], rows: TargetRows) -> _Reading:
    """Mean -log p of the target's tokens in every context row; log-probabilities at the essence row's subject."""
    logp = logits[:, :-1].log_softmax(-1)
    index = repeat(rows.targets, "fact token -> fact context token 1", context=logp.shape[1])
    picked = logp.gather(-1, index)[..., 0]
    mask = rows.target_mask[:, None]
    nll = -(picked * mask).sum(-1) / mask.sum(-1)
    best = (picked.detach() >= logp.detach().amax(-1)) | ~mask
    return _Reading(nll, logits[:, -1, -1].log_softmax(-1), best.all(-1).all(-1))


def _done(read: _Reading, loss: Tensor, prob: Tensor, kl: Tensor, objective: Objective) -> Bool[Tensor, " fact"]:
    if objective.stop_prob is not None:
        return prob >= objective.stop_prob
    done = loss < objective.stop_loss
    if objective.argmax_discount:
        done = done | (read.all_argmax & (kl <= 0.01))
    return done


def _decay(aim: Aim, objective: Objective) -> float:
    return objective.v_weight_decay if aim.decay is None else aim.decay


def _relative(delta: Float[Tensor, "fact d"], now: Float[Tensor, "fact d"]) -> Float[Tensor, " fact"]:
    return delta.norm(dim=-1) / now.norm(dim=-1) ** 2


@torch.no_grad()
def _step(
    optimizer: torch.optim.Optimizer,
    delta: dict[Aim, Tensor],
    now: dict[Aim, Tensor],
    active: Bool[Tensor, " fact"],
    objective: Objective,
) -> None:
    """One Adam step for the active requests, each δ pulled back into its ball; the others stay as they are."""
    kept = {a: d.detach().clone() for a, d in delta.items()}
    optimizer.step()
    for aim, d in delta.items():
        longest = (objective.clamp_norm_factor if aim.clamp is None else aim.clamp) * now[aim].norm(
            dim=-1, keepdim=True
        )
        d.mul_((longest / d.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1))
        d.copy_(torch.where(active[:, None], d, kept[aim]))
