"""Keys and values of tokens that were read before: when they say enough, how they are kept, and how one reads on."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .model import TracedModel
from .tokens import Batch

Prefix = tuple[Float[Tensor, "row head pos d_head"], Float[Tensor, "row head pos d_head"]]


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


def new_cache(model: TracedModel) -> Any:
    """An empty key-value cache of the kind that this model's layers take."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache(config=model.module.config)


def stored(cache: Any, n_layers: int, ids: Int[Tensor, "row pos"]) -> list[Prefix] | None:
    """A cache's keys and values by layer; None when it does not hold all tokens of all layers."""
    held = [(layer.keys, layer.values) for layer in cache.layers if getattr(layer, "keys", None) is not None]
    complete = all(k.dim() == 4 and (k.shape[0], k.shape[2]) == tuple(ids.shape) for k, _ in held)
    return held if complete and len(held) == n_layers else None


@torch.no_grad()
def cached_logits(
    model: TracedModel, batch: Batch, cache: Any, keep: int = 1, past: Int[Tensor, "row past"] | None = None
) -> Float[Tensor, "row keep vocab"]:
    """Logits of the last `keep` positions of tokens that are read behind a cache, and added to it; float32.

    Args:
        batch: the new tokens. Padded on the left like all rows, they leave padding between the two, which the mask
            hides and the positions do not count.
        cache: of `new_cache`, with the rows of the batch.
        past: the mask of the tokens that the cache holds; None while it is empty.
    """
    whole = batch if past is None else Batch(batch.ids, torch.cat([past, batch.mask], 1))
    arguments = model.inputs(whole, keep, past_key_values=cache, use_cache=True)
    if "position_ids" in arguments:
        arguments["position_ids"] = arguments["position_ids"][:, -batch.ids.shape[1] :]
    with model.nnsight.trace(**arguments):
        out = model.last_logits(keep).save()
    return out.float()
