"""Which requests a target search runs together: of like length, so that few columns are run for nothing.

A batch runs as many columns as its longest request needs from δ's first place on, so a shorter one wastes the
difference in each of its rows. A batch of its own costs another pass over the weights instead: about as much as some
number of tokens more. Requests are put in order of length, and cut into batches where the sum of both is least.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..facts.fact import Fact, fill
from ..memory import free_on
from ..prompts import target_ids, template_span, token_ids
from ..sites import Kind
from .aims import Aim, Position
from .contexts import Contexts
from .target_suffix import lowest_block

if TYPE_CHECKING:
    from ..model import TracedModel

WEIGHTS = {"cpu": 48, "cuda": 256}
"""A pass over the weights, in tokens: reading a weight takes as long as computing with it for so many."""

DISPATCH = {"cpu": 5e8, "cuda": 4e12}
"""Calling a forward's and a backward's operations one by one, in floating-point operations of their time."""


class _Length(NamedTuple):
    """What a request runs: columns from δ's first place on, target tokens, tokens of the bare prompt and target."""

    suffix: int
    target: int
    whole: int


def target_batches(
    model: TracedModel, facts: Sequence[Fact], aims: Sequence[Aim], contexts: Contexts, size: int
) -> list[list[int]]:
    """Places of the facts, batch by batch: at most `size`, or fewer where half the free memory would not hold them.

    With memory enough the batches follow from the facts, the aims and the model alone.
    """
    lengths = [_length(model, fact, aims) for fact in facts]
    order = sorted(range(len(facts)), key=lambda i: (lengths[i], i))
    rows, worth = len(contexts.flat), worth_of_a_run(model, aims)
    longest = max(len(token_ids(model.tokenizer, fill(context, " "))) for context in contexts.flat)
    room = free_on(model.device) // 2
    least, begins = [0.0], [0]
    for stop in range(1, len(order) + 1):
        last = lengths[order[stop - 1]]
        fit = max(1, min(size, stop, room // _bytes(model, aims, last, rows + 1, longest)))
        costs = [(least[b] + worth + (stop - b) * rows * last.suffix, b) for b in range(stop - fit, stop)]
        cost, begin = min(costs)
        least.append(cost)
        begins.append(begin)
    batches: list[list[int]] = []
    stop = len(order)
    while stop:
        batches.insert(0, order[begins[stop] : stop])
        stop = begins[stop]
    return batches


def worth_of_a_run(model: TracedModel, aims: Sequence[Aim]) -> float:
    """How many tokens more a step may run where that saves it a forward of its own."""
    start = min(lowest_block(aims), model.n_layers - 1)
    weights = sum(p.numel() for layer in range(start, model.n_layers) for p in _block(model, layer).parameters())
    device = model.device.type if model.device.type in WEIGHTS else "cuda"
    return WEIGHTS[device] + DISPATCH[device] / (4 * weights)  # a token: 2 operations a weight, forward and backward


def _length(model: TracedModel, fact: Fact, aims: Sequence[Aim]) -> _Length:
    tokenizer = model.tokenizer
    prompt = len(token_ids(tokenizer, fact.prompt))
    target = len(target_ids(tokenizer, fact.prompt, fact.target or ""))
    first = prompt - 1
    if any(aim.position is Position.SUBJECT_LAST for aim in aims):
        first = template_span(tokenizer, fact.template, fact.subject).last
    whole = prompt + target - 1
    return _Length(whole - first, target, whole)


def _bytes(model: TracedModel, aims: Sequence[Aim], length: _Length, rows: int, context: int) -> int:
    """About what a request takes at the peak of a step: the graph, keys and values, logits."""
    width, above = length.whole + context, model.n_layers - min(lowest_block(aims), model.n_layers - 1)
    graph = 48 * length.suffix * above * model.d_model
    cache = 6 * width * model.n_layers * model.d_model
    logits = 16 * length.target * model.vocab_size
    return rows * (model.dtype.itemsize * (graph + cache) + logits)


def _block(model: TracedModel, layer: int) -> torch.nn.Module:
    return model.module.get_submodule(model.layout.path(Kind.RESID, layer))
