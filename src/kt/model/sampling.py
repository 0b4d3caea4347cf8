"""Batched generation whose rows do not depend on their batch, and leave it when they are done.

Text is made by Hugging Face's `generate`, some tokens at a time over one key-value cache. Between two such rounds the
rows that have ended or have all their tokens are taken out, so that a batch costs what its rows need, not what its
longest would need times their number.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..errors import shortcut_off
from .tokens import encode_ids, pad_id, token_ids

ROUND = 10
"""Tokens between two looks at which rows are done. A round costs about one more step on a small model."""

_FROM_START = ("min_length", "min_new_tokens", "exponential_decay_length_penalty", "begin_suppress_tokens")
"""Rules of a generation config that count from where a text began: every round would begin them anew."""


class SeededGumbel(LogitsProcessor):
    """Sampling as an argmax: each row adds Gumbel noise from its own generator to its top-k logits.

    Hugging Face draws a whole batch from one global generator, so a row's text would change with its neighbours.
    """

    def __init__(self, texts: Sequence[str], seed: int, top_k: int | None) -> None:
        self.top_k = top_k
        self.generators = [torch.Generator().manual_seed(_row_seed(text, seed)) for text in texts]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self.generators = [self.generators[row] for row in rows]

    def __call__(self, input_ids: Int[Tensor, "row pos"], scores: Float[Tensor, "row vocab"]) -> Any:
        noise = torch.empty(scores.shape)
        for row, generator in zip(noise, self.generators, strict=True):
            torch.rand(row.shape, generator=generator, out=row)
        noise = noise.to(scores.device)
        if not self.top_k:
            return scores.float() + _gumbel(noise)
        allowed = scores >= scores.topk(min(self.top_k, scores.shape[-1]), -1).values[:, -1:]
        noisy = torch.full_like(noise, -torch.inf)
        noisy[allowed] = scores[allowed].float() + _gumbel(noise[allowed])
        return noisy


def _gumbel(uniform: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return -(-uniform.clamp(1e-12, 1 - 1e-7).log()).log()


class Generator(Protocol):
    """The parts of a `TracedModel` that text is generated with."""

    module: Any
    tokenizer: Any
    name: str

    @property
    def nnsight(self) -> Any: ...

    @property
    def cache_keyword(self) -> str | None: ...

    @property
    def device(self) -> torch.device: ...


@dataclass(frozen=True)
class Continuation:
    """A prompt's tokens and those that follow it: up to a limit, or to the model's end of text, which is the last.

    Greedy tokens do not depend on how many are asked for, and neither do a sampled row's: the first n of them are
    what a limit of n would have given.
    """

    prompt: tuple[int, ...]
    added: tuple[int, ...]

    def text(self, tokenizer: Any, tokens: int | None = None) -> str:
        """What follows the prompt, or the first `tokens` of it.

        SentencePiece drops the space of a text's first word, so prompt and continuation are decoded together.
        """
        added = self.added[:tokens]
        head = tokenizer.decode(self.prompt, skip_special_tokens=True)
        whole = tokenizer.decode(self.prompt + added, skip_special_tokens=True)
        if whole.startswith(head):
            return str(whole[len(head) :])
        return str(tokenizer.decode(added, skip_special_tokens=True))


def continue_greedily_or_sample(
    model: Generator,
    prompts: Sequence[str],
    max_new_tokens: int,
    do_sample: bool,
    top_k: int | None,
    seed: int,
) -> list[str]:
    """Continuations without their prompts, up to `max_new_tokens` or the model's own end of text."""
    limits = [max_new_tokens] * len(prompts)
    found = continued(model, prompts, limits, do_sample=do_sample, top_k=top_k, seed=seed)
    return [row.text(model.tokenizer) for row in found]


@torch.no_grad()
def continued(
    model: Generator,
    prompts: Sequence[str],
    limits: Sequence[int],
    *,
    do_sample: bool = False,
    top_k: int | None = None,
    seed: int = 0,
) -> list[Continuation]:
    """Each prompt's continuation of at most as many tokens as its limit, all in one batch."""
    read = [tuple(token_ids(model.tokenizer, prompt)) for prompt in prompts]
    added: list[tuple[int, ...]] = [()] * len(prompts)
    every = range(len(prompts))
    in_rounds = _cache(model) is not None
    for rows in [every] if in_rounds else [[r for r in every if limits[r] == n] for n in sorted(set(limits))]:
        noise = SeededGumbel([prompts[r] for r in rows], seed, top_k) if do_sample else None
        found = _together(model, [read[r] for r in rows], [limits[r] for r in rows], noise)
        for row, tokens in zip(rows, found, strict=True):
            added[row] = tokens
    return [Continuation(*row) for row in zip(read, added, strict=True)]


def _together(
    model: Generator, read: Sequence[tuple[int, ...]], limits: Sequence[int], noise: SeededGumbel | None
) -> list[tuple[int, ...]]:
    """What follows each row of one batch; a row leaves when it has ended or has its number of tokens."""
    if not read:
        return []
    batch = encode_ids(read, pad_id(model.tokenizer)).to(model.device)
    added: list[tuple[int, ...]] = [()] * len(read)
    cache, ends = _cache(model), _end_ids(model)
    ids, mask, live = batch.ids, batch.mask, list(range(len(read)))
    while live:
        # No row is taken beyond its own limit: that may be the model's last position.
        left = min(limits[row] - len(added[row]) for row in live)
        ids, mask, new = _step(model, ids, mask, left if cache is None else min(ROUND, left), cache, noise)
        for row, tokens in zip(live, new.tolist(), strict=True):
            added[row] += _up_to_end(tokens, ends)
        on = [i for i, row in enumerate(live) if len(added[row]) < limits[row] and added[row][-1] not in ends]
        if len(on) < len(live):
            live, ids, mask = [live[i] for i in on], ids[on], mask[on]
            if live and cache is not None:
                cache.batch_select_indices(torch.tensor(on))
            if noise is not None:
                noise.keep(on)
    return added


def _step(
    model: Generator,
    ids: Int[Tensor, "row pos"],
    mask: Int[Tensor, "row pos"],
    tokens: int,
    cache: Any,
    noise: SeededGumbel | None,
) -> tuple[Int[Tensor, "row longer"], Int[Tensor, "row longer"], Int[Tensor, "row new"]]:
    """All rows by up to `tokens` more: ids and mask as they are then, and what is new."""
    longer = model.nnsight.generate(
        input_ids=ids,
        attention_mask=mask,
        **({} if cache is None else {str(model.cache_keyword): cache}),
        max_new_tokens=tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        forced_eos_token_id=None,
        pad_token_id=pad_id(model.tokenizer),
        logits_processor=LogitsProcessorList([] if noise is None else [noise]),
    )
    new = longer[:, ids.shape[1] :]
    return longer, torch.cat([mask, torch.ones_like(new)], 1), new


def _cache(model: Generator) -> DynamicCache | None:
    """An empty cache that rows can be taken out of between rounds; None, with a warning, where there can be none."""
    why = _one_round_because(model)
    if why is None:
        return DynamicCache(config=model.module.config.get_text_config())
    shortcut_off(
        f"{model.name}: rows that are done stay in the batch while texts are generated, because {why}; the texts are "
        "the same, but a batch costs what its longest row costs"
    )
    return None


def _one_round_because(model: Generator) -> str | None:
    """Why all tokens have to come in one round, if they have to: a rule that counts tokens, or an unfit cache."""
    rules = model.module.generation_config
    if counted := [name for name in (*_FROM_START, "cache_implementation") if getattr(rules, name, None)]:
        return f"its generation config sets {', '.join(counted)}"
    if model.cache_keyword not in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters:
        return "its forward does not take the dynamic key-value cache that `generate` hands on"
    layers = DynamicCache(config=model.module.config.get_text_config()).layers
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return "some of its layers keep a state beside keys and values"
    return None


def _end_ids(model: Generator) -> frozenset[int]:
    """The tokens that end a text."""
    ends = model.module.generation_config.eos_token_id
    return frozenset([ends] if isinstance(ends, int) else ends or ())


def _up_to_end(tokens: Sequence[int], ends: frozenset[int]) -> tuple[int, ...]:
    """The tokens up to the first that ends a text, that one included; padding stands behind it."""
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[: stop + 1])


def _row_seed(text: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {text}".encode()).digest()[:7], "big")
