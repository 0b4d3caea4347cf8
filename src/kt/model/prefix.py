"""The clean and the corrupted run of a group of prompts with equal token counts (001, section 3.1).

One of them is the *base*, which patched runs start from, the other the *donor* of what is patched in. The base keeps
every block's input, and the keys and values of every attention: patched at (layer l, token t), a run differs from its
base only at layers >= l and tokens >= t.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from ..tracing.forward import _ATTENTION, prefix_is_off
from .model import TracedModel

Prefix = tuple[Float[Tensor, "row head pos d_head"], Float[Tensor, "row head pos d_head"]]


def saved(value: Any) -> Any:
    """Keep a value beyond its trace (`Tensor.save` is nnsight's)."""
    return value.save()


def prefix_is_reusable(model: TracedModel, length: int) -> bool:
    """Whether keys and values of earlier tokens say all that later tokens need of them; a warning says why not.

    Not so with recurrent or linear-attention layers, and not kept by a sliding window shorter than the prompt.
    """
    config = model.module.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    others = set(getattr(config, "layer_types", None) or ()) - _ATTENTION
    short = [window for window in windows if window is not None and window <= length]
    if model.cache_keyword is None:
        prefix_is_off(model, "its forward takes no dynamic key-value cache as `past_key_values` or `cache`")
    elif others:
        prefix_is_off(model, f"keys and values do not hold the state of its layers ({', '.join(sorted(others))})")
    elif short:
        prefix_is_off(model, f"its attention window of {min(short)} tokens is not longer than the prompts")
    else:
        return True
    return False


def new_cache(model: TracedModel) -> Any:
    """An empty key-value cache of the kind that this model's layers take."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache(config=model.module.config)


def stored(model: TracedModel, cache: Any, ids: Int[Tensor, "row pos"]) -> list[Prefix] | None:
    """A cache's keys and values by layer; None (and a warning) when it does not hold all tokens of all layers."""
    held = [(layer.keys, layer.values) for layer in cache.layers if getattr(layer, "keys", None) is not None]
    complete = all(k.dim() == 4 and (k.shape[0], k.shape[2]) == tuple(ids.shape) for k, _ in held)
    if complete and len(held) == model.n_layers:
        return held
    prefix_is_off(model, "its cache does not hold all tokens of all layers")
    return None
