"""The search for δ written as plainly as PyTorch allows: one request at a time, as ROME's and MEMIT's `compute_z`.

Every step runs all rows of the request whole, through all layers, with logits at all positions. The yardstick for
`kt.editing`'s `find_targets`: the tests compare its δ with this one, `target_speed.py` its time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kt
from kt.editing.closed_form import objective as terms
from kt.editing.closed_form.aims import Position, TargetSite
from kt.model.tokens import target_ids, template_span, token_ids


@dataclass(frozen=True)
class Numbers:
    """An objective as numbers, under ROME's and MEMIT's names. `argmax_discount`: PMET's rule; `stop_prob`: JEEP's."""

    v_num_grad_steps: int = 25
    v_lr: float = 0.5
    v_weight_decay: float = 1e-3
    kl_factor: float = 0.0625
    clamp_norm_factor: float = 4.0
    stop_loss: float = 5e-2
    stop_prob: float | None = None
    argmax_discount: bool = False

    @property
    def objective(self) -> terms.Objective:
        """The same as the terms that `find_targets` takes."""
        stops: list[terms.Term] = [terms.StopBelow(self.stop_loss)]
        if self.argmax_discount:
            stops.append(terms.StopAtArgmax(self.kl_factor))
        if self.stop_prob is not None:
            stops = [terms.StopAtProbability(self.stop_prob)]
        likelihood = terms.DiscountedNLL() if self.argmax_discount else terms.NLL()
        bounds = (terms.WeightDecay(self.v_weight_decay), terms.ClampNorm(self.clamp_norm_factor))
        return terms.Objective(
            (likelihood, terms.KL(self.kl_factor), *bounds, *stops), self.v_num_grad_steps, self.v_lr
        )


def plain_target(
    model: kt.TracedModel, fact: kt.Fact, aims: Sequence[TargetSite], templates: Sequence[str], objective: Numbers
) -> dict[TargetSite, tuple[Tensor, Tensor]]:
    """δ and the value before, an aim."""
    words = model.tokenizer
    answer = torch.tensor(target_ids(words, fact.prompt, fact.target or ""))
    inside = [template.replace("{}", fact.template, 1) for template in templates]
    rows = [token_ids(words, t.replace("{}", fact.subject, 1)) for t in inside]
    subjects = [template_span(words, t, fact.subject).last for t in (*inside, "{} is a")]
    prompts = [len(row) - 1 for row in rows]
    rows = [[*row, *answer[:-1].tolist()] for row in rows] + [token_ids(words, f"{fact.subject} is a")]
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    places = {Position.SUBJECT_LAST: subjects, Position.PROMPT_LAST: prompts}
    delta = {aim: torch.zeros(model.d_model, requires_grad=True) for aim in aims}
    first: dict[TargetSite, Tensor] = {}  # the values before, row by row

    def adding(aim: TargetSite, share: float) -> Any:
        def hook(module: Any, given: Any, output: Any) -> Any:
            value = output[0] if isinstance(output, tuple) else output
            shifted = value.view(len(rows), width, -1).clone()
            own, where = share == 1.0, places[aim.position]
            if own:
                first.setdefault(aim, shifted[range(len(where)), where].detach().clone())
            for row, place in enumerate(where):
                start = first[aim][row] if own and aim.below is not None else shifted[row, place]
                shifted[row, place] = start + share * delta[aim].to(shifted.dtype)
            shifted = shifted.view_as(value)
            return (shifted, *output[1:]) if isinstance(output, tuple) else shifted

        return hook

    optimizer, kl_before, weight = torch.optim.Adam(delta.values(), lr=objective.v_lr), None, 1.0
    for step in range(objective.v_num_grad_steps):
        with ExitStack() as hooks:
            for aim in aims:
                for layer, share in (*(aim.below or ()), (aim.site.layer, 1.0)):
                    module = model.module.get_submodule(model.layout.path(aim.site.kind, layer))
                    hooks.callback(module.register_forward_hook(adding(aim, share)).remove)
            logits = model.module(input_ids=ids, attention_mask=mask, use_cache=False).logits
        before = {aim: values[0].float() for aim, values in first.items()}
        log_p = logits.float().log_softmax(-1)
        said = torch.stack([log_p[i, p : p + len(answer)] for i, p in enumerate(prompts)])
        picked = said.gather(-1, answer[None, :, None].expand(len(said), -1, 1))[..., 0]
        nll = -picked.mean(-1)
        essence = log_p[-1, subjects[-1]]
        kl_before = essence.detach() if kl_before is None else kl_before
        kl = objective.kl_factor * (essence.exp() * (essence - kl_before)).sum()
        pull = [objective.v_weight_decay if a.decay is None else a.decay for a in aims]
        decay = sum(p * delta[a].norm() / before[a].norm() ** 2 for p, a in zip(pull, aims, strict=True))
        loss, argmax = weight * nll.mean() + kl + decay, bool((picked >= said.amax(-1)).all())
        if _stops(objective, loss.item(), (-nll).exp().mean().item(), kl.item(), argmax):
            break
        weight = 0.1 if objective.argmax_discount and argmax else 1.0
        if step == objective.v_num_grad_steps - 1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for aim, d in delta.items():
                longest = (objective.clamp_norm_factor if aim.clamp is None else aim.clamp) * before[aim].norm()
                d.mul_(min(1.0, float(longest / d.norm().clamp(min=1e-12))))
    return {aim: (delta[aim].detach(), before[aim]) for aim in aims}


def _stops(objective: Numbers, loss: float, prob: float, kl: float, argmax: bool) -> bool:
    if objective.stop_prob is not None:
        return prob >= objective.stop_prob
    return loss < objective.stop_loss or (objective.argmax_discount and argmax and kl <= 0.01)
