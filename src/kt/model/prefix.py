"""Keys and values of tokens that several prompts share: read once, kept, and read on from."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from ..errors import shortcut_off
from .model import TracedModel

Prefix = tuple[Float[Tensor, "row head pos d_head"], Float[Tensor, "row head pos d_head"]]

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
"""The kinds of layer of which a cache holds all there is to know."""


def saved(value: Any) -> Any:
    """Keep a value beyond its trace (`Tensor.save` is nnsight's)."""
    return value.save()


def prefix_is_off(model: TracedModel, why: str) -> None:
    """Warn, once for each reason, that prompts are read whole where kept keys and values would have done."""
    shortcut_off(
        f"{model.name}: keys and values of earlier tokens are not reused, because {why}; the numbers are the same, "
        "but prompts are read whole each time, which costs about twice the work"
    )


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
