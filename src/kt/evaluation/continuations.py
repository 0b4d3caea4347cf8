"""Continuations of many prompts: each prompt once, for its longest wish; the shorter wishes are its first tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from ..model import TracedModel
from ..prompts import token_ids
from ..sampling import continued
from .teacher import packed, shared_out

AUTO_WRITTEN_TOKENS = 8192
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
    """Fulfil every wish, greedily unless `sampling` (do_sample, top_k, seed) says otherwise.

    `done` hears how many wishes each batch has fulfilled.
    """
    if not isinstance(model, TracedModel):  # a stand-in that only generates
        return each_by_itself(model, wishes, done, **sampling)
    lengths: dict[str, set[int]] = defaultdict(set)
    for prompt, tokens in wishes:
        lengths[prompt].add(tokens)
    read = {prompt: len(token_ids(model.tokenizer, prompt)) for prompt in lengths}

    def fits(batch: list[str]) -> bool:
        width = max(read[prompt] for prompt in batch) + max(max(lengths[prompt]) for prompt in batch)
        return len(batch) * width <= AUTO_WRITTEN_TOKENS if batch_size == "auto" else len(batch) <= int(batch_size)

    def fulfil(batch: list[str]) -> dict[Wish, str]:
        limits = [max(lengths[prompt]) for prompt in batch]
        texts: dict[Wish, str] = {}
        for prompt, found in zip(batch, continued(model, batch, limits, **sampling), strict=True):
            texts |= {(prompt, tokens): found.text(model.tokenizer, tokens) for tokens in lengths[prompt]}
        return texts

    batches = packed(sorted(lengths, key=lambda prompt: (max(lengths[prompt]), read[prompt])), fits)
    return shared_out("continuations", batches, fulfil, done, lambda batch: sum(len(lengths[p]) for p in batch))


def each_by_itself(
    model: TracedModel, wishes: Iterable[Wish], done: Callable[[int], None] = lambda n: None, **sampling: Any
) -> dict[Wish, str]:
    """The same texts the simple way: one wish at a time."""
    texts: dict[Wish, str] = {}
    for prompt, tokens in dict.fromkeys(wishes):
        (texts[prompt, tokens],) = model.generate([prompt], tokens, **sampling)
        done(1)
    return texts


def room(model: TracedModel, prompt: str, total: int) -> int:
    """How many tokens may follow the prompt, up to `total` with it or to the model's last position.

    Rounded down to a multiple of ten: prompts of like length can then share a batch.
    """
    config = model.module.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or total
    free = min(total, longest) - len(token_ids(model.tokenizer, prompt))
    return max(0, free // 10 * 10)
