"""The part of a forward that depends on δ, run again at every step of a target search.

δ enters at the lowest aim's block and, in each row, at the subject's last token (or the prompt's). Blocks below and
tokens before give the same at every step. So the rows are run whole once; a step runs their last columns through the
blocks from `start` on, over the keys and values that the columns before left, and the head only where logits are read;
so is the last block's MLP.

Whether a model's keys and values say all that later tokens need is found out by running: a few rows, with no δ, must
come to the head as they did whole. Otherwise (recurrent layers, short sliding windows) steps run all columns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import KtError
from ...facts.fact import Fact, fill
from ...model.prefix import Prefix, new_cache, prefix_is_off, prefix_is_reusable, saved, stored
from ...model.sites import Kind, Site
from ...model.tokens import Batch, encode_ids, pad_id, template_span, token_ids, wanted_ids
from .aims import Position, TargetSite
from .contexts import Contexts

if TYPE_CHECKING:
    from ...model.model import TracedModel


# The rows that a target search runs: a request's prompt in every context, and the essence prompt.

Held = Sequence[tuple[Fact, Float[Tensor, " d_model"]]]
"""Of one request: the parts of its answer that come before, each as a request, and the δ at its prompt's last token."""

ESSENCE = "{} is a"
"""A text of its own, about the subject and not the fact: in a chat template it begins a reply, as any sentence does
that goes on, also where the prompt is the user's turn."""
NOWHERE = -1


@dataclass(frozen=True)
class TargetRows:
    """Per request its context rows, which end before the target's last token, then the essence row, which is cut at
    the subject's last token. Padded on the left: what is read stands in the last columns of every row.

    Attributes:
        fact: the request of each row, counted within the batch.
        essence: which rows are essence rows.
        columns: each position's column, where its δ is added; `NOWHERE` for the prompt's last token in an essence row.
        answers: the target's ids, each at the column whose logits should say it.
        reads: which of the last columns are read: the target's, and in an essence row the last.
        held, held_at: shifts of the stream at the aim's layer that stay as they are, and their columns (or `NOWHERE`).
    """

    batch: Batch
    fact: Int[Tensor, " row"]
    essence: Bool[Tensor, " row"]
    columns: dict[Position, Int[Tensor, " row"]]
    answers: Int[Tensor, "row keep"]
    reads: Bool[Tensor, "row keep"]
    held: Float[Tensor, "row shift d_model"]
    held_at: Int[Tensor, "row shift"]

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def keep(self) -> int:
        """The number of last columns that hold everything that is read."""
        return self.reads.shape[1]

    def where(self, position: Position) -> tuple[Int[Tensor, " place"], Int[Tensor, " place"]]:
        """(row, column) of every place that δ of this position is added to."""
        rows = (self.columns[position] != NOWHERE).nonzero()[:, 0]
        return rows, self.columns[position][rows]

    def first_touched(self, aims: Iterable[TargetSite]) -> int:
        """The first column that a δ is added to; δ changes nothing to the left of it."""
        places = [self.where(aim.position)[1] for aim in aims]
        return int(torch.cat([*places, torch.tensor([self.width - 1], device=self.fact.device)]).min())

    @property
    def width(self) -> int:
        return int(self.batch.ids.shape[1])

    def of(self, rows: Bool[Tensor, " row"]) -> TargetRows:
        """Some of the rows, in the same columns."""
        return TargetRows(
            Batch(self.batch.ids[rows], self.batch.mask[rows]),
            self.fact[rows],
            self.essence[rows],
            {position: columns[rows] for position, columns in self.columns.items()},
            self.answers[rows],
            self.reads[rows],
            self.held[rows],
            self.held_at[rows],
        )

    def tight(self) -> TargetRows:
        """The same rows without columns of padding only."""
        spare = self.width - int(self.batch.lengths.max())
        keep = self.keep - int((~self.reads.any(0)).sum())
        return TargetRows(
            Batch(self.batch.ids[:, spare:], self.batch.mask[:, spare:]),
            self.fact,
            self.essence,
            {p: torch.where(c == NOWHERE, NOWHERE, c - spare) for p, c in self.columns.items()},
            self.answers[:, self.keep - keep :],
            self.reads[:, self.keep - keep :],
            self.held,
            torch.where(self.held_at == NOWHERE, NOWHERE, self.held_at - spare),
        )


def target_rows(model: TracedModel, facts: Sequence[Fact], contexts: Contexts, held: Sequence[Held] = ()) -> TargetRows:
    """All rows of some requests, request by request, the first of each its prompt in the first context."""
    tokenizer = model.reader
    ids: list[list[int]] = []
    answers: list[tuple[int, ...]] = []  # a row's; an essence row has none
    owner: list[int] = []
    at: dict[Position, list[int]] = {position: [] for position in Position}
    shifts: list[list[tuple[int, Tensor]]] = []  # a row's: token and δ
    for number, fact in enumerate(facts):
        earlier = held[number] if held else ()
        answer = wanted_ids(tokenizer, fact)
        for index, template in enumerate(contexts.templates(fact, tokenizer)):
            begun = [(fill(contexts.templates(f, tokenizer)[index], f.subject), d) for f, d in earlier]
            shifts.append([(len(token_ids(tokenizer, before)) - 1, d) for before, d in begun])
            prompt = token_ids(tokenizer, fill(template, fact.subject))
            at[Position.SUBJECT_LAST].append(template_span(tokenizer, template, fact.subject).last)
            at[Position.PROMPT_LAST].append(len(prompt) - 1)
            ids.append([*prompt, *answer[:-1]])
            answers.append(answer)
            owner.append(number)
        last = template_span(tokenizer, ESSENCE, fact.subject).last
        at[Position.SUBJECT_LAST].append(last)
        at[Position.PROMPT_LAST].append(NOWHERE)
        ids.append(token_ids(tokenizer, fill(ESSENCE, fact.subject))[: last + 1])
        answers.append(())
        owner.append(number)
        shifts.append([])
    batch = encode_ids(ids, pad_id(tokenizer)).to(model.device)
    columns = {position: _shifted(batch, places) for position, places in at.items()}
    at_reads = _right_aligned(answers, model.device)
    of_fact, is_essence = (torch.tensor(each, device=model.device) for each in (owner, [not a for a in answers]))
    return TargetRows(batch, of_fact, is_essence, columns, *at_reads, *_held(model, batch, shifts))


def split_rows(rows: TargetRows, aims: Collection[TargetSite], essence: bool, worth: float) -> list[TargetRows]:
    """The rows as they are run together: essence rows, one column wide above the lowest aim, apart from the others.

    Without `essence` they are left out. They stay with the others where that wastes fewer than `worth` tokens, which
    is what a forward of their own would cost.
    """
    if not essence:
        return [rows.of(~rows.essence).tight()]
    wasted = int(rows.essence.sum()) * (rows.width - 1 - rows.first_touched(aims))
    if wasted < worth:
        return [rows]
    return [rows.of(~rows.essence).tight(), rows.of(rows.essence).tight()]


def _shifted(batch: Batch, places: Sequence[int]) -> Int[Tensor, " row"]:
    index = torch.tensor(places, device=batch.ids.device)
    return torch.where(index == NOWHERE, NOWHERE, batch.columns(index))


def _held(
    model: TracedModel, batch: Batch, shifts: Sequence[Sequence[tuple[int, Tensor]]]
) -> tuple[Float[Tensor, "row shift d_model"], Int[Tensor, "row shift"]]:
    most = max(map(len, shifts))
    held = torch.zeros(len(shifts), most, model.d_model, device=batch.ids.device)
    at = torch.full((len(shifts), most), NOWHERE, device=batch.ids.device)
    for row, some in enumerate(shifts):
        for number, (token, shift) in enumerate(some):
            held[row, number], at[row, number] = shift, token + batch.ids.shape[1] - batch.lengths[row]
    return held, at


def _right_aligned(
    answers: Sequence[tuple[int, ...]], device: torch.device
) -> tuple[Int[Tensor, "row keep"], Bool[Tensor, "row keep"]]:
    width = max(map(len, answers))
    ids = torch.zeros((len(answers), width), dtype=torch.long)
    for row, answer in enumerate(answers):
        ids[row, width - len(answer) :] = torch.tensor(answer)
    lengths = torch.tensor([max(1, len(a)) for a in answers])
    reads = torch.arange(width)[None] >= width - lengths[:, None]
    return ids.to(device), reads.to(device)


ORDER = (Kind.ATTN, Kind.MLP, Kind.RESID)
"""The order in which a block computes its values."""

Deltas = Mapping[TargetSite, Float[Tensor, "fact d_model"]]


Attention = Float[Tensor, "row head pos"]


@dataclass(frozen=True)
class Suffix:
    """Rows from column `cut` on, as they enter block `start`; `prefixes` are the columns before, block by block, and
    `before` every target site's value in each row. `attention`: from block `start` on, what the prompt's last token
    gives to each token without δ, where that is read."""

    rows: TargetRows
    start: int
    cut: int
    entering: Float[Tensor, "row suffix d_model"]
    prefixes: Sequence[Prefix]
    before: Mapping[TargetSite, Float[Tensor, "row d_model"]]
    attention: Sequence[Attention] = ()

    def of(self, facts: Bool[Tensor, " fact"]) -> Suffix:
        """The rows of some of the requests."""
        kept = facts[self.rows.fact]
        prefixes = [(keys[kept.to(keys.device)], values[kept.to(keys.device)]) for keys, values in self.prefixes]
        entering = self.entering[kept.to(self.entering.device)]
        before = {aim: value[kept.to(value.device)] for aim, value in self.before.items()}
        attention = [weights[kept.to(weights.device)] for weights in self.attention]
        return Suffix(self.rows.of(kept), self.start, self.cut, entering, prefixes, before, attention)


def lowest_block(aims: Sequence[TargetSite]) -> int:
    """The first block whose output depends on δ."""
    return min(aim.lowest_layer + (aim.site.kind is Kind.RESID) for aim in aims)


def run_whole(
    model: TracedModel, rows: TargetRows, aims: Sequence[TargetSite]
) -> tuple[Suffix, dict[TargetSite, Float[Tensor, "row d_model"]]]:
    """The rows' one whole forward: what a step starts from, and the value now at each aim in every row."""
    start, cut = lowest_block(aims), rows.first_touched(aims)
    cache = new_cache(model) if cut and prefix_is_reusable(model, rows.width) else None
    entering, now, arriving = _first_run(model, rows, aims, start, cache)
    if cache is not None and (prefixes := stored(model, cache, rows.batch.ids)) is not None:
        before = [(keys[:, :, :cut], values[:, :, :cut]) for keys, values in prefixes[start:]]
        short = Suffix(rows, start, cut, entering[:, cut:], before, now)
        if _arrives_the_same(model, short, arriving):
            return short, now
        prefix_is_off(model, "rows read over kept keys and values did not reach the head as whole rows do")
    return Suffix(rows, start, 0, entering, [], now), now


@torch.no_grad()
def _first_run(
    model: TracedModel, rows: TargetRows, aims: Sequence[TargetSite], start: int, cache: Any
) -> tuple[Tensor, dict[TargetSite, Tensor], Tensor | None]:
    """The residual stream that enters block `start`, values at the aims, and (with a cache) what reaches the head."""
    size, every = len(rows), torch.arange(len(rows), device=model.device)
    last = model.n_layers if cache is not None else max(start, max(a.site.layer for a in aims) + 1)
    now: dict[TargetSite, Tensor] = {}
    row, shift = (rows.held_at != NOWHERE).nonzero().T
    column, shifts = rows.held_at[row, shift], rows.held[row, shift]
    entering: list[Tensor] = []
    arriving: list[Tensor] = []
    arguments = model.inputs(rows.batch, rows.keep, cache)
    with model.nnsight.trace(**arguments) as tracer:
        for layer in range(last):
            if layer == start == 0:
                entering.append(saved(model.block(0).input.clone()))
            for kind in ORDER:
                for aim in aims:
                    if aim.site == Site(kind, layer):
                        full: Any = model.value(aim.site, size)
                        if len(row):
                            full[row.to(full.device), column.to(full.device)] += shifts.to(full)
                        now[aim] = saved(
                            full[every.to(full.device), rows.columns[aim.position].to(full.device)].float()
                        )
            if layer == start - 1:
                entering.append(saved(model.value(Site(Kind.RESID, layer), size).clone()))
        if cache is not None:
            arriving.append(saved(_read_states(model, rows).clone()))
        tracer.stop()
    return entering[0], {a: now[a] for a in aims}, arriving[0] if arriving else None


class Above(NamedTuple):
    """Layers of whose stream the context rows are read at a target's place, and what a forward found there."""

    position: Position
    layers: range
    found: list[Float[Tensor, "row d_model"]]


def suffix_logits(
    model: TracedModel,
    suffix: Suffix,
    delta: Deltas,
    above: Above | None = None,
    attention: list[Attention] | None = None,
) -> Float[Tensor, "read vocab"]:
    """Logits where `rows.reads` says, row by row, with every δ added at its aim: float32, with a gradient.

    Args:
        above: takes up the stream behind its layers, with a gradient.
        attention: gets, from block `start` on, what the prompt's last token gives to each token (`eagerly`).
    """
    logits = _run_suffix(model, suffix, delta, to_the_head=False, above=above, attention=attention)
    return logits.float().to(model.device)


@contextmanager
def eagerly(model: TracedModel) -> Iterator[None]:
    """Attention that gives its weights, inside the block.

    Raises:
        KtError: the model's code has no such attention.
    """
    before = getattr(model.module.config, "_attn_implementation", None)
    try:
        model.module.set_attn_implementation("eager")  # type: ignore[operator]
    except (AttributeError, ValueError, NotImplementedError):
        raise KtError(f"{model.name} has no eager attention, whose weights {DRIFT} reads; leave it out") from None
    try:
        yield
    finally:
        model.module.set_attn_implementation(before)  # type: ignore[operator]


DRIFT = "attention_drift"
SMALL = 1e-8
"""Added to both sides of the KL, as in SADR's code."""


def drift(now: Sequence[Attention], suffix: Suffix) -> Float[Tensor, " fact"]:
    """Σ over layers and heads of KL(before ‖ now), of heads whose weight on the subject's last token is above that of
    all heads before; a mean over a request's rows."""
    rows = suffix.rows
    asked = ~rows.essence
    total = torch.zeros(int(asked.sum()), device=rows.fact.device)
    for old, new in zip(suffix.attention, now, strict=True):
        own = asked.to(old.device)
        p, q = (weights[own].float() + SMALL for weights in (old, new))
        subject = rows.columns[Position.SUBJECT_LAST][asked].to(p.device)[:, None, None].expand(-1, p.shape[1], 1)
        far = q.gather(-1, subject)[..., 0] > p.gather(-1, subject)[..., 0].amax(-1, keepdim=True)
        divergence = (p * (p / q).log()).sum(-1)
        total = total + (divergence * far).sum(-1).to(total.device)
    facts = len(rows.fact.unique())
    return total.view(facts, -1).mean(-1)


def _arrives_the_same(model: TracedModel, suffix: Suffix, whole: Tensor | None) -> bool:
    """Whether the suffix gives the first and the last request the same states at the head as the whole run."""
    rows = suffix.rows
    some = torch.zeros(int(rows.fact.max()) + 1, dtype=torch.bool, device=rows.fact.device)
    some[[int(rows.fact.min()), int(rows.fact.max())]] = True
    assert whole is not None
    want = whole[some[rows.fact[rows.reads.nonzero()[:, 0]]].to(whole.device)].float()
    try:
        with torch.no_grad():
            recomputed = _run_suffix(model, suffix.of(some), {}, to_the_head=True).float()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError):  # a cache that the model does not take
        return False
    close = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    return bool(((recomputed - want).norm(dim=-1) <= close * want.norm(dim=-1)).all())


def _run_suffix(
    model: TracedModel,
    suffix: Suffix,
    delta: Deltas,
    to_the_head: bool,
    above: Above | None = None,
    attention: list[Attention] | None = None,
) -> Tensor:
    """Logits where they are read, or what the head would make them from."""
    rows, start, size = suffix.rows, suffix.start, len(suffix.rows)
    every, last = torch.arange(size), rows.columns[Position.PROMPT_LAST].clamp(min=suffix.cut) - suffix.cut
    seen = above.layers if above is not None else range(0)
    if above is not None:
        row, column = rows.where(above.position)
        row, column = row[~rows.essence[row]], column[~rows.essence[row]] - suffix.cut
    shifts = {aim: _Shift.of(suffix, aim, d) for aim, d in delta.items()}
    entering = suffix.entering.clone()
    for aim, shift in shifts.items():
        if aim.site == Site(Kind.RESID, start - 1):
            entering = entering.index_put(shift.places(entering), shift.by(entering), accumulate=True)
    filler = (entering, None) if model.layout.tuple_output else entering
    result: list[Tensor] = []
    with model.nnsight.trace(**_arguments(model, suffix)) as tracer:
        for layer in range(start):
            model.block(layer).skip(filler)
        if start == 0:
            model.block(0).input = entering
        for layer in range(start, model.n_layers):
            for kind in ORDER:
                for aim, shift in shifts.items():
                    if share := aim.share_at(Site(kind, layer)):
                        value: Any = model.value(Site(kind, layer), size)
                        if aim.below is not None and layer == aim.site.layer:
                            value[shift.places(value)] = shift.put(value)
                        else:
                            value[shift.places(value)] += shift.by(value, share)
                if kind is Kind.ATTN and attention is not None:
                    weights = _attention_weights(model, layer)
                    attention.append(saved(weights[every.to(weights.device), :, last.to(weights.device)]))
            if above is not None and layer in seen:
                stream: Any = model.value(Site(Kind.RESID, layer), size)
                above.found.append(saved(stream[row.to(stream.device), column.to(stream.device)]))
        if _narrows(model, suffix, delta) and model.n_layers - 1 not in seen:
            _mlp_of_read_columns(model, rows.keep)
        states = _read_states(model, rows)
        if to_the_head:
            result.append(saved(states))
            tracer.stop()
        else:
            result.append(saved(model.head_logits(states[:, None])[:, 0]))
    return result[0]


def _attention_weights(model: TracedModel, layer: int) -> Any:
    """Inside a trace: a block's attention weights, (row, head, query, key)."""
    output: Any = model.envoy(f"{model.layout.blocks}.{layer}.{model.layout.at(layer).attn}").output
    parts = output if isinstance(output, tuple) else ()
    found = next((part for part in parts[1:] if isinstance(part, Tensor) and part.dim() == 4), None)
    if found is None:
        raise KtError(f"block {layer} of {model.name} gives no attention weights, which {DRIFT} reads; leave it out")
    return found


def _narrows(model: TracedModel, suffix: Suffix, delta: Deltas) -> bool:
    """Whether the last block's MLP may be given fewer columns: there are fewer, and δ is added to none there."""
    last = model.n_layers - 1
    parts = model.layout.at(last)
    own_module = parts.mlp != parts.w_mlp
    inside = suffix.start <= last and all(aim.site.layer < last for aim in delta)
    return own_module and inside and suffix.cut > 0 and suffix.rows.width - suffix.cut > suffix.rows.keep


def _mlp_of_read_columns(model: TracedModel, keep: int) -> None:
    """Inside a trace: past the last attention no column sees another, so those that are not read stay zero."""
    last = model.n_layers - 1
    mlp = model.envoy(f"{model.layout.blocks}.{last}.{model.layout.at(last).mlp}")
    given = mlp.input
    mlp.input = given[:, -keep:].contiguous()
    mlp.output = torch.nn.functional.pad(mlp.output, (0, 0, given.shape[1] - keep, 0))


def _read_states(model: TracedModel, rows: TargetRows) -> Any:
    """Inside a trace: what the head is given in the columns that are read, as a dense matrix of `read` rows."""
    given = model.envoy(model.layout.unembed).input[:, -rows.keep :]
    return given[rows.reads.to(given.device)]


def _arguments(model: TracedModel, suffix: Suffix) -> dict[str, Any]:
    """Arguments of one forward over the suffix's columns, with a new cache, since a forward adds its keys to it."""
    batch = suffix.rows.batch
    arguments = model.inputs(batch, suffix.rows.keep)
    if not suffix.cut:
        return arguments
    cache = new_cache(model)
    for layer in range(model.n_layers):  # of a skipped block only the length counts, for the masks
        device = model.device if layer < suffix.start else suffix.prefixes[layer - suffix.start][0].device
        nothing = torch.zeros((1, 1, suffix.cut, 1), device=device, dtype=model.dtype)
        cache.update(nothing, nothing, layer)
        if layer >= suffix.start:  # put there, not added: no copy
            cache.layers[layer].keys, cache.layers[layer].values = suffix.prefixes[layer - suffix.start]
    short = {name: arguments[name][:, suffix.cut :] for name in ("input_ids", "position_ids") if name in arguments}
    return arguments | short | model.cache_arguments(cache)


@dataclass(frozen=True)
class _Shift:
    """δ of an aim, at each place of the suffix that it is added to."""

    where: tuple[Int[Tensor, " place"], Int[Tensor, " place"]]
    each: Float[Tensor, "place d_model"]
    before: Float[Tensor, "place d_model"]

    @classmethod
    def of(cls, suffix: Suffix, aim: TargetSite, delta: Float[Tensor, "fact d_model"]) -> _Shift:
        rows, columns = suffix.rows.where(aim.position)
        before = suffix.before[aim]
        return cls((rows, columns - suffix.cut), delta[suffix.rows.fact[rows]], before[rows.to(before.device)])

    def places(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns on the device of `value`: blocks may lie on several devices."""
        rows, columns = self.where
        return rows.to(value.device), columns.to(value.device)

    def by(self, value: Tensor, share: float = 1.0) -> Tensor:
        each = self.each.to(value.device, value.dtype)
        return each if share == 1 else share * each

    def put(self, value: Tensor) -> Tensor:
        """The value from before and δ."""
        return (self.before.to(self.each) + self.each).to(value.device, value.dtype)
