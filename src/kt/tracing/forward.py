"""The clean and the corrupted run of a group of prompts with equal token counts (IntAttn-Edit, section 3.1).

One of them is the *base*, from which patched runs start, the other the *donor* of the patched-in values. The base keeps
every block's input, and the keys and values of every attention, because a run patched at (layer l, token t) differs
from its base only at layers >= l and tokens >= t.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..model.model import TracedModel
from ..model.prefix import new_cache, saved, stored
from .patches import Prompts, Run, Source, live_tensor, readout, unpadded_batch
from .remote_patch import scores_of, together


@torch.no_grad()
def run_rows(
    model: TracedModel,
    ids: Int[Tensor, "row pos"],
    noise: Float[Tensor, "row pos d_embed"] | None,
    answers: Int[Tensor, "row keep"],
    foils: Int[Tensor, " row"] | None,
    *,
    start: bool = False,
    prefix: bool = False,
    sources: Sequence[Source] = (),
) -> Run:
    """One forward of the prompts, with `noise` added to the embeddings.

    Args:
        answers, foils: the token ids that are scored at the last positions; see `readout`.
        start: keep every block's input, from which patched runs start; with `prefix` also all keys and values.
        sources: the tensors to keep, those of a layer in the order of a forward (`sources_at`).
    """
    if model.remote:
        prompts = Prompts(ids, noise)
        scores: Any = scores_of(model, [(prompts, torch.arange(len(ids)))], [], 0, answers, foils)
        return Run([], None, {}, scores, prompts)
    cache = new_cache(model) if start and prefix else None
    keep = answers.shape[1]
    arguments = model.inputs(unpadded_batch(ids), keep, cache)
    inputs: list[Tensor] = []
    values: dict[Source, Tensor] = {}
    by_layer: dict[int, list[Source]] = {}
    for source in sources:
        by_layer.setdefault(source.site.layer, []).append(source)
    with model.nnsight.trace(**arguments):
        if noise is not None:
            embedded = model.embed.output
            model.embed.output = (embedded + noise.to(embedded.device)).to(embedded.dtype)
        for layer in range(model.n_layers):
            if start:
                inputs.append(model.block(layer).input.clone().save())
            for source in by_layer.get(layer, ()):
                values[source] = saved(live_tensor(model, source, len(ids)).clone())
        scores = saved(readout(model.last_logits(keep), answers, foils))
    return Run(inputs, None if cache is None else stored(model, cache, ids), values, scores)


def joined(parts: Sequence[Run]) -> Run:
    """Concatenate the rows of several runs."""
    if len(parts) == 1:
        return parts[0]
    inputs = [torch.cat(layer) for layer in zip(*(p.inputs for p in parts), strict=True)]
    values = {source: torch.cat([p.values[source] for p in parts]) for source in parts[0].values}
    prefixes = None
    if all(p.prefixes is not None for p in parts):
        layers = zip(*(p.prefixes or [] for p in parts), strict=True)
        prefixes = [(torch.cat([k for k, _ in la]), torch.cat([v for _, v in la])) for la in layers]
    prompts = together([p.prompts for p in parts if p.prompts is not None])
    return Run(inputs, prefixes, values, torch.cat([p.scores for p in parts], 1), prompts)
