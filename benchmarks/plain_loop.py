"""Causal tracing written as plainly as nnsight allows: one trace for each kind, layer and token.

The yardstick for `kt.causal_trace`: the tests compare its numbers with these, `trace_speed.py` its time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kt.model import TracedModel
from kt.sites import Kind, Site


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
) -> dict[str, Tensor]:
    """Per kind p(r) and logit(r) - logit(r') as (metric, layer, token, sample), patched in every cell.

    `noise` (samples, subject tokens, d_model) is added to the embeddings of the tokens [start, stop).
    """
    samples, length = len(noise), len(ids)
    clean_ids = torch.tensor([list(ids)], device=model.device)
    corrupt_ids = clean_ids.expand(samples, -1)
    results = {kind: torch.zeros(2, model.n_layers, length, samples) for kind in kinds}
    for kind in kinds:
        clean = []
        with model.nns.trace(input_ids=clean_ids, use_cache=False):
            for layer in range(model.n_layers):
                clean.append(model.value(Site(Kind(kind), layer), 1).clone().save())
        for layer in range(model.n_layers):
            for token in range(length):
                patched = range(max(0, layer - window // 2), min(model.n_layers, layer - (-window // 2)))
                with model.nns.trace(input_ids=corrupt_ids, use_cache=False):
                    embedded = model.embed.output
                    embedded[:, start:stop] = (embedded[:, start:stop] + noise.to(embedded.device)).to(embedded.dtype)
                    for other in patched:
                        value = model.value(Site(Kind(kind), other), samples)
                        value[:, token] = clean[other][0, token]
                    logits = model.nns.output.logits[:, -1].float().save()
                results[kind][0, layer, token] = logits.softmax(-1)[:, answer]
                results[kind][1, layer, token] = logits[:, answer] - logits[:, foil]
    return results
