"""Batched generation whose sampled rows do not depend on the batch they are in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from .prompts import encode, pad_id

if TYPE_CHECKING:
    from .model import TracedModel


class SeededGumbel(LogitsProcessor):
    """Sampling as an argmax: each row adds Gumbel noise from its own generator to its top-k logits.

    Hugging Face draws a whole batch from one global generator, so a row's text would change with its neighbours.
    """

    def __init__(self, texts: Sequence[str], seed: int, top_k: int | None) -> None:
        self.top_k = top_k
        self.generators = [torch.Generator().manual_seed(_row_seed(text, seed)) for text in texts]

    def __call__(self, input_ids: Int[Tensor, "row pos"], scores: Float[Tensor, "row vocab"]) -> Any:
        noise = torch.stack([torch.rand(scores.shape[-1], generator=g) for g in self.generators])
        noisy = scores.float() - (-noise.clamp(1e-12, 1 - 1e-7).log()).log().to(scores.device)
        if self.top_k:
            floor = scores.topk(min(self.top_k, scores.shape[-1]), -1).values[:, -1:]
            noisy = noisy.masked_fill(scores < floor, -torch.inf)
        return noisy


@torch.no_grad()
def continue_greedily_or_sample(
    model: TracedModel,
    prompts: Sequence[str],
    max_new_tokens: int,
    do_sample: bool,
    top_k: int | None,
    seed: int,
) -> list[str]:
    """Continuations without their prompts, up to `max_new_tokens` or the model's own end of text."""
    if not prompts:
        return []
    batch = encode(model.tokenizer, prompts).to(model.device)
    processors = LogitsProcessorList([SeededGumbel(prompts, seed, top_k)] if do_sample else [])
    ids = model.nns.generate(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=pad_id(model.tokenizer),
        logits_processor=processors,
    )
    return [_continuation(model.tokenizer, row, batch.ids.shape[1]) for row in ids]


def _continuation(tokenizer: Any, row: Int[Tensor, " pos"], start: int) -> str:
    """What follows the prompt. SentencePiece drops the space of a text's first word, so the whole row is decoded."""
    head = tokenizer.decode(row[:start], skip_special_tokens=True)
    whole = tokenizer.decode(row, skip_special_tokens=True)
    if whole.startswith(head):
        return str(whole[len(head) :])
    return str(tokenizer.decode(row[start:], skip_special_tokens=True))


def _row_seed(text: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {text}".encode()).digest()[:7], "big")
