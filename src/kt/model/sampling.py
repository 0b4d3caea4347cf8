"""Batched generation: a row's text does not depend on its batch, and finished rows leave the batch.

Hugging Face's `generate` makes the text in rounds of a few tokens over one key-value cache. Between rounds, rows that
have ended or reached their limit are removed, so a batch costs the sum of its rows, not its longest row times their
number.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..errors import shortcut_off
from .batches import BatchSize, batches_by_length, map_batches
from .effects import rendered
from .tokens import encode_ids, pad_id, reader, token_ids

AUTO_WRITTEN_TOKENS = 8192
"""Tokens of a batch under batch_size="auto", those to come counted: what the key-value cache has to hold."""

ROUND = 10
"""Tokens per round. On a small model a round costs about one extra step."""

_FROM_START = ("min_length", "min_new_tokens", "exponential_decay_length_penalty", "begin_suppress_tokens")
"""Rules of a generation config that count from the start of the text, which every round would restart."""

_OF_THE_PROMPT = ("encoder_repetition_penalty", "encoder_no_repeat_ngram_size")
"""Rules of a generation config about what stands before the new tokens, which in a second round holds new ones."""

_OF_ALL_TOKENS = ("min_length", "repetition_penalty", "no_repeat_ngram_size", "exponential_decay_length_penalty")
"""Rules of a generation config that read or count a row's tokens, and would take its padding for its own."""

_ONE_PLAIN_TEXT = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "forced_eos_token_id": None,
    "constraints": None,
    "force_words_ids": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "diversity_penalty": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "use_mtp": None,
    "token_healing": None,
    "prefill_chunk_size": None,
    "stop_strings": None,
    "max_time": None,
    "return_dict_in_generate": None,
    "output_attentions": None,
    "output_hidden_states": None,
    "output_scores": None,
    "output_logits": None,
}
"""Keys of a generation config that ask for another search, other texts a prompt or another form of the result, by the
value that asks for the greedy text alone."""


class SeededGumbel(LogitsProcessor):
    """Sampling as an argmax: each row adds Gumbel noise from its own generator to its top-k logits.

    Hugging Face draws a batch from one global generator, so that a row's text would depend on the other rows.
    """

    def __init__(self, texts: Sequence[str], seed: int, top_k: int | None) -> None:
        self.top_k = top_k
        self.generators = [torch.Generator().manual_seed(_row_seed(text, seed)) for text in texts]

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
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
    """The parts of a `TracedModel` that generation uses."""

    module: Any
    tokenizer: Any
    name: str

    @property
    def reader(self) -> Any: ...

    @property
    def nnsight(self) -> Any: ...

    @property
    def cache_keyword(self) -> str | None: ...

    @property
    def device(self) -> torch.device: ...


@dataclass(frozen=True)
class Continuation:
    """A prompt's tokens and the added ones, up to a limit or to the model's end of text, which is included.

    Tokens do not depend on the limit: the first n of them are the result of a limit of n, greedy or sampled.
    """

    prompt: tuple[int, ...]
    added: tuple[int, ...]

    def text(self, tokenizer: Any, tokens: int | None = None) -> str:
        """The text of the added tokens, or of the first `tokens` of them.

        SentencePiece drops the space of a text's first word, so prompt and continuation are decoded together.
        """
        added = self.added[:tokens]
        prompt = tokenizer.decode(self.prompt, skip_special_tokens=True)
        text = tokenizer.decode(self.prompt + added, skip_special_tokens=True)
        if text.startswith(prompt):
            return str(text[len(prompt) :])
        return str(tokenizer.decode(added, skip_special_tokens=True))


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
    """Continue each prompt by at most its limit of tokens, in one batch.

    Args:
        limits: the most new tokens of each prompt.
        do_sample: sample with `seed` from the `top_k` most likely tokens (None: from all); otherwise greedy.
    """
    prompt_ids = [tuple(token_ids(reader(model), rendered(model, prompt))) for prompt in prompts]
    added: list[tuple[int, ...]] = [()] * len(prompts)
    in_rounds, unpadded = _cache(model) is not None, bool(_set(model, _OF_ALL_TOKENS + _OF_THE_PROMPT))
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row, ids in enumerate(prompt_ids):
        alike[len(ids) if unpadded else 0, 0 if in_rounds else limits[row]].append(row)
    for _, rows in sorted(alike.items()):
        noise = SeededGumbel([prompts[r] for r in rows], seed, top_k) if do_sample else None
        new = _continue_batch(model, [prompt_ids[r] for r in rows], [limits[r] for r in rows], noise)
        for row, tokens in zip(rows, new, strict=True):
            added[row] = tokens
    return [Continuation(*row) for row in zip(prompt_ids, added, strict=True)]


def _continue_batch(
    model: Generator, prompts: Sequence[tuple[int, ...]], limits: Sequence[int], noise: SeededGumbel | None
) -> list[tuple[int, ...]]:
    """The new tokens of each row of one batch; a row leaves at the end of its text or at its limit."""
    if not prompts:
        return []
    batch = encode_ids(prompts, pad_id(model.tokenizer)).to(model.device)
    added: list[tuple[int, ...]] = [()] * len(prompts)
    ends = model.module.generation_config.eos_token_id
    ends = frozenset([ends] if isinstance(ends, int) else ends or ()) | _turn_ends(model)
    cache = _cache(model)
    ids, mask, live = batch.ids, batch.mask, list(range(len(prompts)))
    while live:
        # No row goes beyond its limit, which may be the model's last position.
        left = min(limits[row] - len(added[row]) for row in live)
        ids, mask, new = _round(model, ids, mask, left if cache is None else min(ROUND, left), cache, noise)
        for row, tokens in zip(live, new.tolist(), strict=True):
            stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
            added[row] += tuple(tokens[: stop + 1])  # padding follows an end token
        unfinished = [i for i, row in enumerate(live) if len(added[row]) < limits[row] and added[row][-1] not in ends]
        if len(unfinished) < len(live):
            live, ids, mask = [live[i] for i in unfinished], ids[unfinished], mask[unfinished]
            if live and cache is not None:
                cache.batch_select_indices(torch.tensor(unfinished))
            if noise is not None:
                noise.keep(unfinished)
    return added


def _turn_ends(model: Generator) -> frozenset[int]:
    """The token that ends a turn of the model's chat template, where prompts are asked in it."""
    reader = getattr(model, "chat", None)
    return frozenset(reader.end_ids[-1:] if reader is not None else ())


def _round(
    model: Generator,
    ids: Int[Tensor, "row pos"],
    mask: Int[Tensor, "row pos"],
    tokens: int,
    cache: Any,
    noise: SeededGumbel | None,
) -> tuple[Int[Tensor, "row longer"], Int[Tensor, "row longer"], Int[Tensor, "row new"]]:
    """Extend all rows by up to `tokens` tokens: the longer ids and mask, and the new tokens."""
    kept = {} if cache is None else {str(model.cache_keyword): cache, "use_cache": True}
    rules = model.module.generation_config
    plain = {name: value for name, value in _ONE_PLAIN_TEXT.items() if getattr(rules, name, None) not in (None, value)}
    if "attention" not in getattr(getattr(model, "layout", None), "mixers", ("attention",)):
        kept = {"use_cache": False}  # transformers' cache asks its attention layers how long it is
    from .at_rest import one_forward

    with one_forward(model.module):  # nnsight takes a call during another thread's trace for a part of that
        longer = model.nnsight.generate(
            input_ids=ids,
            attention_mask=mask,
            **kept,
            max_new_tokens=tokens,
            do_sample=False,
            **plain,
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
    counted = [name for name in (*_FROM_START, "cache_implementation") if getattr(rules, name, None)]
    if counted := counted + _set(model, _OF_THE_PROMPT):
        return f"its generation config sets {', '.join(counted)}"
    if model.cache_keyword not in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters:
        return "its forward does not take the dynamic key-value cache that `generate` hands on"
    layers = DynamicCache(config=model.module.config.get_text_config()).layers
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return "some of its layers keep a state beside keys and values"
    return None


def _set(model: Generator, names: Sequence[str]) -> list[str]:
    """Which of these rules, for which 0 and 1 stand for none, the model's generation config has."""
    rules = vars(model.module.generation_config)
    return [name for name in names if rules.get(name) not in (None, 0, 1)]


def _row_seed(text: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {text}".encode()).digest()[:7], "big")


GenerationRequest = tuple[str, int]
"""A prompt and the number of tokens to add."""


def continuations(
    model: Any,
    requests: Iterable[GenerationRequest],
    batch_size: BatchSize = "auto",
    done: Callable[[int], None] = lambda n: None,
    **sampling: Any,
) -> dict[GenerationRequest, str]:
    """The text of every request, each prompt continued once: shorter texts are the first tokens of its longest.

    Several processes share the batches.

    Args:
        model: a `TracedModel`, or a stand-in that has `generate` alone.
        requests: what to write; equal ones count once.
        batch_size: prompts of a batch, or "auto". No text depends on it.
        done: called with the number of requests that each batch finished.
        sampling: do_sample, top_k and seed, as for `TracedModel.generate`; greedy without.
    """
    if not hasattr(model, "cache_keyword"):
        return continue_one_by_one(model, requests, done, **sampling)
    lengths: dict[str, set[int]] = defaultdict(set)
    for prompt, tokens in requests:
        lengths[prompt].add(tokens)
    read = {prompt: len(token_ids(reader(model), rendered(model, prompt))) for prompt in lengths}

    def fits(batch: list[str]) -> bool:
        width = max(read[prompt] for prompt in batch) + max(max(lengths[prompt]) for prompt in batch)
        return len(batch) * width <= AUTO_WRITTEN_TOKENS if batch_size == "auto" else len(batch) <= int(batch_size)

    def write(batch: list[str]) -> dict[GenerationRequest, str]:
        rows = continued(model, batch, [max(lengths[prompt]) for prompt in batch], **sampling)
        return {(p, n): row.text(model.tokenizer, n) for p, row in zip(batch, rows, strict=True) for n in lengths[p]}

    batches = batches_by_length(lengths, lambda prompt: (max(lengths[prompt]), read[prompt]), fits)
    parts = map_batches("continuations", batches, write, done, lambda batch: sum(len(lengths[p]) for p in batch))
    return {request: text for part in parts for request, text in part.items()}


def continue_one_by_one(
    model: Any,
    requests: Iterable[GenerationRequest],
    done: Callable[[int], None] = lambda n: None,
    **sampling: Any,
) -> dict[GenerationRequest, str]:
    """The texts of `continuations` the simple way: one request at a time."""
    texts: dict[GenerationRequest, str] = {}
    for prompt, tokens in dict.fromkeys(requests):
        (texts[prompt, tokens],) = model.generate([prompt], tokens, **sampling)
        done(1)
    return texts
