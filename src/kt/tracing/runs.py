"""The clean and the corrupted run of a group of prompts with equal token counts (001, section 3.1).

One of them is the *base*, which patched runs start from, the other the *donor* of what is patched in. The base keeps
every block's input, and the keys and values of every attention: patched at (layer l, token t), a run differs from its
base only at layers >= l and tokens >= t.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..model import TracedModel
from ..prompts import Batch
from ..sites import Kind, Site
from .patches import End, Source
from .whole_rows import Prompts, scores_of, together

ORDER: tuple[tuple[Kind, End], ...] = (
    (Kind.ATTN, "key"),
    (Kind.ATTN, "value"),
    (Kind.MLP, "value"),
    (Kind.RESID, "value"),
)
"""The order in which a block computes them: nnsight reads and writes a forward in its own order."""

Prefix = tuple[Float[Tensor, "row head pos d_head"], Float[Tensor, "row head pos d_head"]]


class Run(NamedTuple):
    """A forward of one row for each fact, or of facts x samples (samples innermost), and what was kept of it."""

    inputs: list[Float[Tensor, "row pos d_model"]]
    prefixes: list[Prefix] | None
    values: dict[Source, Float[Tensor, "row pos d"]]
    scores: Float[Tensor, "metric row"]
    prompts: Prompts | None = None  # of a remote model alone, which is not asked for the others (see whole_rows.py)


def whole(ids: Int[Tensor, "row pos"]) -> Batch:
    """Rows of equal length as a batch without padding."""
    return Batch(ids, torch.ones_like(ids))


def readout(
    logits: Float[Tensor, "row vocab"], answers: Int[Tensor, " row"], foils: Int[Tensor, " row"]
) -> Float[Tensor, "metric row"]:
    """p(r) and logit(r) - logit(r') of every row, in float32."""
    logits = logits.float()
    right = logits.gather(1, answers.to(logits.device)[:, None])[:, 0]
    wrong = logits.gather(1, foils.to(logits.device)[:, None])[:, 0]
    return torch.stack([(right - logits.logsumexp(-1)).exp(), right - wrong])


def saved(value: Any) -> Any:
    """Keep a value beyond its trace (`Tensor.save` is nnsight's)."""
    return value.save()


def prefix_is_reusable(model: TracedModel, length: int) -> bool:
    """Whether keys and values of earlier tokens say all that later tokens need of them.

    Not so with recurrent or linear-attention layers, and not kept by a sliding window shorter than the prompt.
    """
    config = model.module.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    kinds = set(getattr(config, "layer_types", None) or ())
    return (
        "past_key_values" in model._forward_parameters
        and kinds <= {"full_attention", "sliding_attention", "chunked_attention"}
        and all(length < window for window in windows if window is not None)
    )


@torch.no_grad()
def run_rows(
    model: TracedModel,
    ids: Int[Tensor, "row pos"],
    noise: Float[Tensor, "row pos d_embed"] | None,
    answers: Int[Tensor, " row"],
    foils: Int[Tensor, " row"],
    *,
    start: bool = False,
    prefix: bool = False,
    sources: Collection[Source] = (),
) -> Run:
    """One forward, with `noise` added to the embeddings.

    Args:
        start: keep what patched runs start from, every block's input; with `prefix` also all keys and values.
        sources: whose tensors to keep.
    """
    if model.remote:
        prompts = Prompts(ids, noise)
        scores: Any = scores_of(model, [(prompts, torch.arange(len(ids)))], [], 0, answers, foils)
        return Run([], None, {}, scores, prompts)
    cache = new_cache(model) if start and prefix else None
    arguments = model.inputs(whole(ids), past_key_values=cache, use_cache=cache is not None)
    inputs: list[Tensor] = []
    values: dict[Source, Tensor] = {}
    with model.nns.trace(**arguments):
        if noise is not None:
            embedded = model.embed.output
            model.embed.output = (embedded + noise.to(embedded.device)).to(embedded.dtype)
        for layer in range(model.n_layers):
            if start:
                inputs.append(model.block(layer).input.clone().save())
            for kind, end in ORDER:
                source = Source(Site(kind, layer), end)
                if source in sources:
                    values[source] = saved(at(model, source, len(ids)).clone())
        scores = saved(readout(model.last_logits()[:, -1], answers, foils))
    return Run(inputs, None if cache is None else stored(cache, model.n_layers, ids), values, scores)


def at(model: TracedModel, source: Source, rows: int) -> Any:
    """The live tensor of a source inside a trace."""
    return model.key(source.site, rows) if source.end == "key" else model.value(source.site, rows)


def new_cache(model: TracedModel) -> Any:
    """An empty key-value cache of the kind that this model's layers take."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache(config=model.module.config)


def stored(cache: Any, n_layers: int, ids: Int[Tensor, "row pos"]) -> list[Prefix] | None:
    """A cache's keys and values by layer; None when it does not hold all tokens of all layers."""
    held = [(layer.keys, layer.values) for layer in cache.layers if getattr(layer, "keys", None) is not None]
    complete = all(k.dim() == 4 and (k.shape[0], k.shape[2]) == tuple(ids.shape) for k, _ in held)
    return held if complete and len(held) == n_layers else None


def joined(parts: Sequence[Run]) -> Run:
    """Runs of several blocks of rows as one."""
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
