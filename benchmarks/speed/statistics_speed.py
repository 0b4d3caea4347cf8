"""The token rate of second moments beside that of the plain forward, on the same documents in the same batches.

    python benchmarks/speed/statistics_speed.py  # a random GPT-2 of 12 layers with d_model 768
    python benchmarks/speed/statistics_speed.py --small  # 4 layers with d_model 128: seconds

The plain forward is Hugging Face's own, with the logits of one position a document. A pass that takes a few layers may
be faster than it, since it ends at the last of them; one that takes every module of every layer cannot be. The last
row is the obvious way to take several weights: one pass each, whole forwards, the whole product.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from measure import Row, command, counted, measured, product_rate
from trace_speed import random_gpt2

import kt
from kt.editing.closed_form.key_sums import Sums, blocks, take_sums
from kt.facts.corpus import Corpus
from kt.model.sites import Kind, Site
from kt.model.tokens import encode_ids, pad_id

MORE_THAN = 0.9
"""The least share of the plain forward's token rate, where a few layers are taken."""


def rows(small: bool) -> Iterator[Row]:
    """One layer, the layers that MEMIT edits in a model of this depth, every module of every layer."""
    torch.set_num_threads(1)
    layers, width, tokens = (4, 128, 4096) if small else (12, 768, 8192)
    model, corpus = random_gpt2(layers, width), Corpus.open("demo")
    rate = product_rate()
    few = [Site(Kind.MLP, layer) for layer in (range(1, 3) if small else range(3, 8))]
    every = [Site(kind, layer) for layer in range(layers) for kind in (Kind.ATTN, Kind.MLP)]
    forwards = [documents for block in blocks(model, corpus, tokens) for documents in block.forwards]
    batches = [[document.ids for document in documents] for documents in forwards]
    plain_forward(model, batches[:1])
    asked = {"one layer's down_proj": few[-1:], f"{len(few)} layers' down_proj": few, "every W_o and down_proj": every}
    plain = measured(lambda: plain_forward(model, batches))[1]
    shared = few[-1]  # of every row
    whole = one_pass_a_weight(model, batches, shared)
    for name, sites in asked.items():
        sums, ours = measured(lambda sites=sites: take(model, sites, corpus, tokens))  # type: ignore[misc]
        yield Row(
            part="statistics",
            work=f"C of {name}, {layers} layers, d_model {width}, {sums.n_tokens:,} tokens",
            reference="plain forward of the same batches",
            ours=ours,
            theirs=plain,
            counted=counted(lambda sites=sites: take(model, sites, corpus, tokens)),  # type: ignore[misc]
            rate=rate,
            difference=float((sums.mean(shared) - whole).norm() / whole.norm()),
            bound=1e-5,
            goal=None if small or len(sites) == len(every) else MORE_THAN,
            note="share of the plain forward's token rate",
        )
    few = few[-2:]
    sums, ours = measured(lambda: take(model, few, corpus, tokens))
    one_by_one, theirs = measured(lambda: {site: one_pass_a_weight(model, batches, site) for site in few})
    yield Row(
        part="statistics",
        work=f"C of {len(few)} layers' down_proj",
        reference="a pass a weight, whole forward, whole product",
        ours=ours,
        theirs=theirs,
        counted=counted(lambda: take(model, few, corpus, tokens)),
        rate=rate,
        difference=max(float((sums.mean(s) - c).norm() / c.norm()) for s, c in one_by_one.items()),
        bound=1e-5,
    )


def take(model: kt.TracedModel, sites: Sequence[Site], corpus: Corpus, tokens: int) -> Sums:
    """What `kt cov` runs, without its cache."""
    with tempfile.TemporaryDirectory() as folder:
        return take_sums(model, sites, corpus, tokens, None, Path(folder) / "checkpoint.safetensors", None)


@torch.no_grad()
def plain_forward(model: kt.TracedModel, batches: Sequence[list[list[int]]]) -> None:
    """Hugging Face's forward of the batches, nothing read."""
    for ids in batches:
        batch = encode_ids(ids, pad_id(model.tokenizer))
        masked = {"attention_mask": batch.mask, "position_ids": batch.positions}
        model.module(input_ids=batch.ids, **masked, use_cache=False, logits_to_keep=1)


@torch.no_grad()
def one_pass_a_weight(model: kt.TracedModel, batches: Sequence[list[list[int]]], site: Site) -> torch.Tensor:
    """C of one weight, as plainly as a hook allows."""
    total, count = torch.zeros(model.key_size(site), model.key_size(site), dtype=torch.float64), 0
    seen: list[torch.Tensor] = []
    hook = model.projection(site).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for ids in batches:
        batch = encode_ids(ids, pad_id(model.tokenizer))
        model.module(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False)
        keys = seen.pop()[batch.mask.bool()]
        total += (keys.T @ keys).double()
        count += len(keys)
    hook.remove()
    return (total / count).float()


if __name__ == "__main__":
    raise SystemExit(command(rows, __doc__))
