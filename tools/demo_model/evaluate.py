"""What the trained model knows: recall on prompts, second hops, perplexity, residual norms, free text."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from demo_data.knowledge import Item
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

BATCH = 128


@dataclass(frozen=True)
class Hit:
    """Whether the first token of the answer is top-1, and whether greedy decoding gives all of it."""

    first: bool
    full: bool


@torch.no_grad()
def score(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, asked: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], Hit]:
    """Score each (prompt, answer). Padding on the right is behind a causal mask, so it changes nothing."""
    rows = []
    for prompt, answer in dict.fromkeys(asked):
        start = tokenizer(prompt).input_ids
        rows.append(((prompt, answer), len(start), tokenizer(f"{prompt} {answer}").input_ids))
    rows.sort(key=lambda row: len(row[2]))
    hits = {}
    for at in range(0, len(rows), BATCH):
        chunk = rows[at : at + BATCH]
        width = max(len(ids) for _, _, ids in chunk)
        batch = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for _, _, ids in chunk])
        top = model(input_ids=batch, use_cache=False).logits.argmax(-1)
        for (key, start, ids), said in zip(chunk, top.tolist(), strict=True):
            right = [said[i - 1] == ids[i] for i in range(start, len(ids))]
            hits[key] = Hit(right[0], all(right))
    return hits


def recall(hits: dict[tuple[str, str], Hit], items: Iterable[Item]) -> dict[str, object]:
    """Shares of right answers over trained and held-out pairs, in all and by relation."""
    tally: dict[tuple[str, str, str], list[bool]] = defaultdict(list)
    for item in items:
        for split, templates in (("trained", item.trained), ("held_out", item.held_out)):
            for template in templates:
                hit = hits[item.prompt(template), item.answer]
                for relation in ("all", item.relation):
                    tally[relation, split, "top1"].append(hit.first)
                    tally[relation, split, "exact"].append(hit.full)
        for split, hops in (("hop_trained", item.hops_trained), ("hop_held_out", item.hops_held_out)):
            for hop in hops:
                tally["all", split, "top1"].append(hits[item.hop(hop)].first)
                tally[item.relation, split, "top1"].append(hits[item.hop(hop)].first)
    table: dict[str, dict[str, float]] = defaultdict(dict)
    for (relation, split, kind), values in tally.items():
        table[relation][f"{split}_{kind}"] = round(sum(values) / len(values), 4)
        table[relation][f"{split}_n"] = len(values)
    return dict(table)


def questions(items: Iterable[Item]) -> list[tuple[str, str]]:
    """Every (prompt, answer) that ``recall`` asks for."""
    asked = []
    for item in items:
        asked += [(item.prompt(t), item.answer) for t in (*item.trained, *item.held_out)]
        asked += [item.hop(hop) for hop in (*item.hops_trained, *item.hops_held_out)]
    return asked


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> float:
    """Per-token perplexity over documents, each scored on its own from its second token."""
    total, count = 0.0, 0
    for text in documents:
        ids = torch.tensor([tokenizer(text).input_ids])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        total += functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return math.exp(total / count)


@torch.no_grad()
def residual_norms(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]
) -> list[float]:
    """Mean norm of the residual stream: the embeddings, then after each block."""
    sums = torch.zeros(model.config.num_hidden_layers + 1)

    def reader(at: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            sums[at] += args[0].norm(dim=-1).mean()

        return hook

    stages = [*model.model.layers, model.model.norm]
    handles = [stage.register_forward_pre_hook(reader(at)) for at, stage in enumerate(stages)]
    for text in documents:
        model(input_ids=torch.tensor([tokenizer(text).input_ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return [round(value, 3) for value in (sums / len(documents)).tolist()]


@torch.no_grad()
def continuations(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, starts: Sequence[str], tokens: int = 85
) -> list[str]:
    """Greedy text after each start, up to the end-of-text."""
    texts = []
    for start in starts:
        ids = torch.tensor([tokenizer(start).input_ids])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=1
        )
        texts.append(tokenizer.decode(out[0], skip_special_tokens=True))
    return texts


def repetition(texts: Sequence[str]) -> float:
    """Share of word trigrams that repeat an earlier one in the same text; a loop drives it towards one."""
    again = total = 0
    for text in texts:
        words = text.split()
        grams = list(zip(words, words[1:], words[2:], strict=False))
        again += len(grams) - len(set(grams))
        total += len(grams)
    return again / max(total, 1)
