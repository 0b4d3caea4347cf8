"""Causal tracing written as plainly as nnsight allows: one trace for each kind, layer and token.

The yardstick for `kt.causal_trace`: the tests compare its numbers with these, `trace_speed.py` its time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kt.model.model import TracedModel
from kt.model.sites import Kind, Site
from kt.tracing.patches import Patch, heads


@torch.no_grad()
def plain_trace(
    model: TracedModel,
    ids: Sequence[int],
    start: int,
    stop: int,
    noise: Tensor,
    answer: int,
    foil: int,
    kinds: Sequence[str],
    window: int = 1,
    direction: str = "denoise",
) -> dict[str, Tensor]:
    """Per kind p(r) and logit(r) - logit(r') as (metric, layer, token, sample), patched in every cell.

    `noise` (samples, subject tokens, d_model) is added to the embeddings of the tokens [start, stop).
    """
    samples, length = len(noise), len(ids)
    rows = torch.tensor([list(ids)], device=model.device).expand(samples, -1)
    placed = torch.zeros(samples, length, noise.shape[-1])
    placed[:, start:stop] = noise
    base, donor = (placed, None) if direction == "denoise" else (None, placed)
    results = {kind: torch.zeros(2, model.n_layers, length, samples) for kind in kinds}
    for kind in kinds:
        patch = Patch.parse(kind)
        given = everything(model, rows, donor, patch)
        held = everything(model, rows, base, Patch(patch.severed)) if patch.severed else []
        for layer in range(model.n_layers):
            for token in range(length):
                patched = range(max(0, layer - window // 2), min(model.n_layers, layer - (-window // 2)))
                with model.nnsight.trace(input_ids=rows, use_cache=False):
                    corrupt(model, base)
                    for other in range(patched.start, model.n_layers):
                        if patch.severed and other > patched.start:
                            kept = model.value(Site(patch.severed, other), samples)
                            kept[:, token] = held[other][:, token]
                        if other in patched:
                            value = tensor(model, patch, other, samples)
                            value[:, token, columns(model, patch)] = given[other][:, token, columns(model, patch)]
                    logits = model.nnsight.output.logits[:, -1].float().save()
                results[kind][0, layer, token] = logits.softmax(-1)[:, answer]
                results[kind][1, layer, token] = logits[:, answer] - logits[:, foil]
    return results


def everything(model: TracedModel, rows: Tensor, noise: Tensor | None, patch: Patch) -> list[Tensor]:
    """What a run holds at every layer."""
    found = []
    with model.nnsight.trace(input_ids=rows, use_cache=False):
        corrupt(model, noise)
        for layer in range(model.n_layers):
            found.append(tensor(model, patch, layer, len(rows)).clone().save())
    return found


def corrupt(model: TracedModel, noise: Tensor | None) -> None:
    if noise is not None:
        embedded = model.embed.output
        embedded[:] = (embedded + noise.to(embedded.device)).to(embedded.dtype)


def tensor(model: TracedModel, patch: Patch, layer: int, rows: int) -> Any:
    site = Site(patch.kind, layer)
    return model.value(site, rows) if patch.head is None else model.key(Site(Kind.ATTN, layer), rows)


def columns(model: TracedModel, patch: Patch) -> slice:
    if patch.head is None:
        return slice(None)
    size = heads(model)[1]
    return slice(patch.head * size, (patch.head + 1) * size)
