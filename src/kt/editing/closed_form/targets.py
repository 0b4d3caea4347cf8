"""Target search: the value of a site with which the model says the new answer (MEMIT section 4.2 and its code).

For every request a δ per aim is found, all aims of a search together, that minimises

    mean over contexts of -log p(target) / tokens  +  kl_factor · KL(p_now ‖ p_before)  +  Σ decay · ‖δ‖ / ‖v‖²

where the KL is read at the subject's last token of the essence prompt "{} is a" and v is the value before. Adam; after
each step δ is pulled back to ‖δ‖ ≤ clamp · ‖v‖; a request stops by the objective's rule. N steps are N forwards and
N-1 updates. Blocks below the lowest aim and tokens before δ's do not depend on δ, and run once (target_forward.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..._util.progress import Progress
from ...facts.fact import Fact, fill
from ...model.memory import free_on
from ...model.sites import Kind
from ...model.tokens import template_span, token_ids, wanted_ids
from ...runs import parallel
from ...runs.journal import Journal
from .aims import Position, TargetSite
from .contexts import Contexts
from .objective import Objective, SearchStep
from .target_forward import (
    Above,
    Attention,
    Held,
    Suffix,
    TargetRows,
    drift,
    eagerly,
    lowest_block,
    run_whole,
    split_rows,
    suffix_logits,
    target_rows,
)

if TYPE_CHECKING:
    from ...model.model import TracedModel


# Batches of a target search hold requests of like length, so that few columns are wasted.
#
# A batch runs as many columns as its longest request needs from δ's first place on, so a shorter one wastes the
# difference in each of its rows. A batch of its own costs another pass over the weights instead: about as much as some
# number of tokens more. Requests are put in order of length, and cut into batches where the sum of both is least.

WEIGHTS = {"cpu": 48, "cuda": 256}
"""A pass over the weights, in tokens: reading a weight takes as long as computing with it for so many."""

DISPATCH = {"cpu": 5e8, "cuda": 4e12}
"""Calling a forward's and a backward's operations one by one, in floating-point operations of their time."""


class _Length(NamedTuple):
    """A request's lengths in tokens: from δ's first column on, of the target, of the bare prompt with the target."""

    suffix: int
    target: int
    whole: int


def target_batches(
    model: TracedModel, facts: Sequence[Fact], aims: Sequence[TargetSite], contexts: Contexts, size: int
) -> list[list[int]]:
    """Indices of the facts, batch by batch: at most `size`, or fewer where half the free memory would not hold them.

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


def worth_of_a_run(model: TracedModel, aims: Sequence[TargetSite]) -> float:
    """The number of extra tokens that cost as much as one more forward."""
    start = min(lowest_block(aims), model.n_layers - 1)
    blocks = (model.module.get_submodule(model.layout.path(Kind.RESID, n)) for n in range(start, model.n_layers))
    weights = sum(p.numel() for block in blocks for p in block.parameters())
    device = model.device.type if model.device.type in WEIGHTS else "cuda"
    return WEIGHTS[device] + DISPATCH[device] / (4 * weights)  # a token: 2 operations a weight, forward and backward


def _length(model: TracedModel, fact: Fact, aims: Sequence[TargetSite]) -> _Length:
    tokenizer = model.reader
    prompt = len(token_ids(tokenizer, fact.prompt))
    target = len(wanted_ids(tokenizer, fact))
    first = prompt - 1
    if any(aim.position is Position.SUBJECT_LAST for aim in aims):
        first = template_span(tokenizer, fact.template, fact.subject).last
    whole = prompt + target - 1
    return _Length(whole - first, target, whole)


def _bytes(model: TracedModel, aims: Sequence[TargetSite], length: _Length, rows: int, context: int) -> int:
    """Estimated bytes of a request at the peak of a step: the graph, keys and values, logits."""
    width, above = length.whole + context, model.n_layers - min(lowest_block(aims), model.n_layers - 1)
    graph = 48 * length.suffix * above * model.d_model
    cache = 6 * width * model.n_layers * model.d_model
    logits = 16 * length.target * model.vocab_size
    return rows * (model.dtype.itemsize * (graph + cache) + logits)


# Every request's loss from a step's logits: how likely its target is, and the words after the essence prompt.


class TargetLoss(NamedTuple):
    """`nll`: mean -log p of the target's tokens. `essence`: log-probabilities at the essence row's subject, None where
    no essence rows were run. `all_argmax`: every target token is the likeliest in every context."""

    nll: Float[Tensor, "fact context"]
    essence: Float[Tensor, "fact vocab"] | None
    all_argmax: Bool[Tensor, " fact"]


def read_rows(logits: Sequence[Float[Tensor, "read vocab"]], groups: Sequence[TargetRows]) -> TargetLoss:
    """From the logits of groups of rows; the first holds all context rows, and all or none of the essence rows."""
    at_reads, rows, essence = logits[0], groups[0], None
    if len(groups) == 2:
        essence = logits[1].log_softmax(-1)
    elif bool(rows.essence.any()):
        at_essence = rows.essence[_row_of_each_read(rows)]
        essence = at_reads[at_essence].log_softmax(-1)
        at_reads, rows = at_reads[~at_essence], rows.of(~rows.essence)
    nll, argmax = _of_targets(at_reads, rows)
    facts = len(rows.fact.unique())
    nll, argmax = (rearrange(v, "(fact context) -> fact context", fact=facts) for v in (nll, argmax))
    return TargetLoss(nll, essence, argmax.all(-1))


def _of_targets(
    logits: Float[Tensor, "read vocab"], rows: TargetRows
) -> tuple[Float[Tensor, " row"], Bool[Tensor, " row"]]:
    """Mean -log p of each row's target, and whether all its tokens are the likeliest."""
    picked = logits.gather(1, rows.answers[rows.reads][:, None])[:, 0]
    log_p = picked - logits.logsumexp(-1)
    spread = log_p.new_zeros(rows.reads.shape).masked_scatter(rows.reads, log_p)
    best = torch.ones_like(rows.reads).masked_scatter(rows.reads, picked.detach() >= logits.detach().amax(-1))
    return -spread.sum(-1) / rows.reads.sum(-1), best.all(-1)


def _row_of_each_read(rows: TargetRows) -> Int[Tensor, " read"]:
    return rows.reads.nonzero()[:, 0]


class Targets(NamedTuple):
    """Wanted values per aim, the values before, and how the search ended."""

    wanted: dict[TargetSite, Float[Tensor, "fact d_model"]]
    before: dict[TargetSite, Float[Tensor, "fact d_model"]]
    loss: Float[Tensor, " fact"]
    prob: Float[Tensor, " fact"]
    steps: Int[Tensor, " fact"]

    def of(self, places: Sequence[int] | Int[Tensor, " chosen"]) -> Targets:
        """Those of the facts at these places, in that order."""
        wanted, before = ({aim: v[places] for aim, v in part.items()} for part in (self.wanted, self.before))
        return Targets(wanted, before, self.loss[places], self.prob[places], self.steps[places])


def find_targets(
    model: TracedModel,
    facts: Sequence[Fact],
    aims: Sequence[TargetSite],
    contexts: Contexts,
    objective: Objective,
    batch_size: int = 16,
    progress: Progress | None = None,
    journal: Journal | None = None,
    held: Sequence[Held] | None = None,
) -> Targets:
    """One δ an aim and request, `aims` searched together; requests in independent batches, each a journal's phase.

    Several processes share the batches.

    Args:
        held: by request, what is added to the stream at the aim's layer before: the parts of an answer that come first.
    """
    # Of several processes, the one with the least memory free decides: all have to have the same batches.
    choices = parallel.all_gather("batches of requests", target_batches(model, facts, aims, contexts, batch_size))
    batches = max(choices, key=len)
    ends = list(accumulate(map(len, batches)))
    # Batches stand in one order: the place where one begins and its size say which requests are in it.
    what = f"targets-{'+'.join(map(str, aims))}"
    names = [f"{what}-{end - len(batch):05d}-{len(batch)}" for batch, end in zip(batches, ends, strict=True)]
    arguments: list[tuple[Any, ...]] = [
        (model, [facts[i] for i in batch], aims, contexts, objective) for batch in batches
    ]
    if held is not None:
        arguments = [(*given, [held[i] for i in batch]) for given, batch in zip(arguments, batches, strict=True)]
    with eagerly(model) if objective.reads_attention else nullcontext():
        parts = (journal or Journal()).take_each(
            what,
            _find_batch,
            dict(zip(names, arguments, strict=True)),
            None if progress is None else lambda done: progress(ends[done - 1], len(facts)),
        )
    targets = join_targets([_targets(part, aims, model.device) for part in parts])
    return in_order(targets, [i for batch in batches for i in batch])


def _targets(values: Mapping[str, Any], aims: Sequence[TargetSite], device: torch.device) -> Targets:
    """`Targets` from the fields that `_find_batch` gave, on `device`."""
    wanted, before = (dict(zip(aims, (v.to(device) for v in values[p]), strict=True)) for p in ("wanted", "before"))
    return Targets(wanted, before, *(values[part].to(device) for part in ("loss", "prob", "steps")))


def in_order(targets: Targets, places: Sequence[int]) -> Targets:
    """The targets in the order in which the requests were given."""
    return targets.of(torch.tensor(places, device=targets.loss.device).argsort())


def join_targets(parts: Sequence[Targets]) -> Targets:
    """Searches over two lists of facts as one."""
    return Targets(
        {a: torch.cat([p.wanted[a] for p in parts]) for a in parts[0].wanted},
        {a: torch.cat([p.before[a] for p in parts]) for a in parts[0].before},
        torch.cat([p.loss for p in parts]),
        torch.cat([p.prob for p in parts]),
        torch.cat([p.steps for p in parts]),
    )


def _find_batch(
    model: TracedModel,
    facts: Sequence[Fact],
    aims: Sequence[TargetSite],
    contexts: Contexts,
    objective: Objective,
    held: Sequence[Held] = (),
) -> dict[str, Any]:
    """The fields of `Targets`, as a journal keeps them. A request that stops leaves the batch."""
    suffixes, before = _begun(model, facts, aims, contexts, objective, held)
    delta = {a: torch.zeros_like(v, requires_grad=True) for a, v in before.items()}
    rates = {a: objective.rates(a, v) for a, v in before.items()}
    optimizer = torch.optim.Adam(delta.values(), lr=1.0 if objective.lr == "auto" else objective.lr)
    active = torch.ones(len(facts), dtype=torch.bool, device=model.device)
    was_argmax = torch.zeros_like(active)
    argmax_steps = torch.zeros(len(facts), dtype=torch.long, device=model.device)
    steps = torch.zeros(len(facts), dtype=torch.long, device=model.device)
    loss, prob = (torch.ones(len(facts), device=model.device) for _ in range(2))
    unedited: Tensor | None = None
    for number in range(objective.steps):
        on = active.nonzero()[:, 0]
        with torch.enable_grad():
            above = _above(model, aims, objective)
            attention: list[Attention] | None = [] if objective.reads_attention else None
            # The first suffix has all context rows.
            logits = [suffix_logits(model, suffixes[0], delta, above, attention)]
            logits += [suffix_logits(model, s, delta) for s in suffixes[1:]]
            read = read_rows(logits, [s.rows for s in suffixes])
            if attention and number == 0:
                suffixes[0] = replace(suffixes[0], attention=[weights.detach() for weights in attention])
            if number == 0 and read.essence is not None:
                unedited = read.essence.detach()
            step = SearchStep(
                read.nll,
                read.essence,
                None if unedited is None else unedited[on],
                read.all_argmax,
                was_argmax[on],
                argmax_steps[on] + read.all_argmax,
                {aim: delta[aim][on] for aim in aims},
                {aim: before[aim][on] for aim in aims},
                above and torch.stack([v.float().to(model.device).unflatten(0, read.nll.shape) for v in above.found]),
                drift=drift(attention, suffixes[0]) if attention else None,
            )
            losses = objective.loss(step)
        loss[on], prob[on] = losses.detach(), step.prob.detach()
        done = objective.done(step, loss[on])
        active[on] = ~done
        was_argmax[on] = read.all_argmax
        argmax_steps[on] += read.all_argmax
        if number == objective.steps - 1 or not bool(active.any()):
            break
        optimizer.zero_grad()
        losses[~done].sum().backward()
        _step(optimizer, delta, before, rates, active, objective)
        steps += active
        if bool(done.any()):
            suffixes = [s.of(active) for s in suffixes]
    wanted = [(before[a] + delta[a]).detach() for a in aims]
    return {"wanted": wanted, "before": [before[a] for a in aims], "loss": loss, "prob": prob, "steps": steps}


def _above(model: TracedModel, aims: Sequence[TargetSite], objective: Objective) -> Above | None:
    """The layers above the first target whose stream the objective reads; None where it reads none."""
    first = aims[0].site.layer + 1
    layers = range(first, min(first + objective.layers_above, model.n_layers))
    return Above(aims[0].position, layers, []) if layers else None


def _begun(
    model: TracedModel,
    facts: Sequence[Fact],
    aims: Sequence[TargetSite],
    contexts: Contexts,
    objective: Objective,
    held: Sequence[Held],
) -> tuple[list[Suffix], dict[TargetSite, Float[Tensor, "fact d_model"]]]:
    """The forwards that every step repeats, and each target site's value in the first (bare) context row."""
    # Without δ in the essence row, or without weight on it, the KL is zero.
    essence = objective.reads_essence and any(a.position is Position.SUBJECT_LAST for a in aims)
    groups = split_rows(target_rows(model, facts, contexts, held), aims, essence, worth_of_a_run(model, aims))
    runs = [run_whole(model, rows, aims) for rows in groups]
    values = runs[0][1]
    bare = torch.searchsorted(groups[0].fact, torch.arange(len(facts), device=model.device))  # rows stand fact by fact
    return [suffix for suffix, _ in runs], {a: v[bare.to(v.device)].to(model.device) for a, v in values.items()}


@torch.no_grad()
def _step(
    optimizer: torch.optim.Optimizer,
    delta: dict[TargetSite, Tensor],
    before: dict[TargetSite, Tensor],
    rates: dict[TargetSite, Tensor],
    active: Bool[Tensor, " fact"],
    objective: Objective,
) -> None:
    """One Adam step for the active requests, each δ pulled back by the objective's bounds; the others stay."""
    kept = {a: d.detach().clone() for a, d in delta.items()}
    optimizer.step()
    for aim, d in delta.items():
        if objective.lr == "auto":
            d.copy_(kept[aim] + rates[aim] * (d - kept[aim]))  # Adam's step is proportional to its rate
        d.copy_(torch.where(active[:, None], objective.bounded(aim, d, before[aim]), kept[aim]))
