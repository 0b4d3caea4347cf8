"""Continuations of many prompts, batched by how many tokens each may have."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from ..model import TracedModel
from ..prompts import token_ids

AUTO_TOKENS = 8192
"""Tokens of a batch under batch_size="auto", those to come counted: what the key-value cache has to hold."""

Wish = tuple[str, int]
"""A prompt and the number of tokens to add."""


def continuations(
    model: TracedModel,
    wishes: Iterable[Wish],
    batch_size: int | str = "auto",
    done: Callable[[int], None] = lambda n: None,
    **sampling: Any,
) -> dict[Wish, str]:
    """Continue every prompt once, greedily unless `sampling` (do_sample, top_k, seed) says otherwise."""
    groups: dict[int, list[str]] = defaultdict(list)
    for prompt, tokens in dict.fromkeys(wishes):
        groups[tokens].append(prompt)
    texts: dict[Wish, str] = {}
    for tokens, prompts in sorted(groups.items()):
        lengths = {p: len(token_ids(model.tokenizer, p)) for p in prompts}
        prompts.sort(key=lambda p: lengths[p])
        size = AUTO_TOKENS // (lengths[prompts[-1]] + tokens) if batch_size == "auto" else int(batch_size)
        for start in range(0, len(prompts), max(1, size)):
            batch = prompts[start : start + max(1, size)]
            found = model.generate(batch, max_new_tokens=tokens, **sampling)
            texts |= {(prompt, tokens): text for prompt, text in zip(batch, found, strict=True)}
            done(len(batch))
    return texts


def room(model: TracedModel, prompt: str, total: int) -> int:
    """How many tokens may follow the prompt, up to `total` with it or to the model's last position.

    Rounded down to a multiple of ten: prompts of like length can then share a batch.
    """
    config = model.module.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or total
    free = min(total, longest) - len(token_ids(model.tokenizer, prompt))
    return max(0, free // 10 * 10)
