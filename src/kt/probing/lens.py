"""The logit lens: the output distribution that a site's value would give at the end of the residual stream.

JEEP (section 4.1, eq. 5 and 6) reads a vector h with softmax(W_lm(h)). Here h goes through the model's own final
norm, head, scales and soft-caps, so that the last layer's reading is the model's output distribution. With
`final_norm=False` the norm's output is replaced by its input, which is the text's formula. Scales and soft-caps rise
with the logit: they change probabilities, but no rank.

A site's value is the output of the projection (W_o, down_proj) or the residual stream after a block. Where a norm
follows a projection (Gemma 2 and 3, OLMo 2; `layout.has_post_norm`) the attention and MLP readings are taken before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from .._util.progress import Progress, counter
from ..errors import BadFact, UnknownSite, WorkFailed
from ..model.batches import BatchSize, batches_by_length, checked_size, map_batches
from ..model.model import Point, TracedModel
from ..model.sites import Kind, Site
from ..model.tokens import encode_ids, pad_id, token_texts
from .word_sets import SetTokens, of_sets, set_tokens

POSITIONS = ("subject_last", "prediction")
KINDS = ("resid", "attn", "mlp")
TOP = 5
"""Most probable tokens that a probe keeps of every reading."""

_SITES = {"resid": Kind.RESID, "attn": Kind.ATTN, "mlp": Kind.MLP}
_MEMORY = {"cuda": 2 << 30, "cpu": 64 << 20}
"""Bytes of one forward's largest activations, and of the logits in memory at once."""
_COPIES = 3  # the logits, and what logsumexp and the comparison make of them


class LensReading(NamedTuple):
    """Probabilities and ranks. Axes follow POSITIONS, KINDS, and the given layers and tokens.

    Args:
        prob: float32, softmax over the model's whole vocabulary (eq. 5); NaN where no token was given.
        rank: int32, how many tokens are strictly more probable, so 0 is the top (eq. 6); -1 where no token was given.
        start_prob: the probabilities for the residual stream that enters block 0.
        start_rank: the ranks there.
        sets: mean probability of each word set's tokens; NaN where a fact has no such set.
        top: int32, ids of the most probable tokens, the first first; None where none were asked for.
        top_prob: float32, their probabilities.
        whole_log_prob: float32, log-probability of all tokens of each answer, each where it is due behind those before
            it, at the prediction position; None where whole answers were not read.
        whole_rank: int32, the worst rank along the answer there: 0 where every token is at the top.
    """

    prob: Float[ndarray, "fact position kind layer token"]
    rank: Int[ndarray, "fact position kind layer token"]
    start_prob: Float[ndarray, "fact position token"]
    start_rank: Int[ndarray, "fact position token"]
    sets: Float[ndarray, "fact position kind layer set"] | None
    top: Int[ndarray, "fact position kind layer top"] | None = None
    top_prob: Float[ndarray, "fact position kind layer top"] | None = None
    whole_log_prob: Float[ndarray, "fact kind layer answer"] | None = None
    whole_rank: Int[ndarray, "fact kind layer answer"] | None = None

    @staticmethod
    def joined(readings: Sequence[LensReading]) -> LensReading:
        """Readings of other facts, one after another; what one of them lacks is left out."""
        parts = zip(*readings, strict=True)
        return LensReading(*(None if any(p is None for p in some) else np.concatenate(some) for some in parts))  # type: ignore[arg-type]

    def texts(self, tokenizer: Any) -> dict[str, str]:
        """The texts of the most probable tokens, by id (as text, since JSON has no other keys)."""
        ids = [] if self.top is None else [int(i) for i in np.unique(self.top)]
        return {str(i): text for i, text in zip(ids, token_texts(tokenizer, ids), strict=True)}


class _Scores(NamedTuple):
    """Probability and rank of tokens, word sets and the most probable tokens, for rows of vectors."""

    prob: Float[Tensor, "row token"]
    rank: Int[Tensor, "row token"]
    sets: Float[Tensor, "row set"] | None
    top: Int[Tensor, "row top"] | None
    top_prob: Float[Tensor, "row top"] | None


@torch.no_grad()
def read_lens(
    model: TracedModel,
    ids: Sequence[Sequence[int]],
    subject_last: Sequence[int],
    tokens: Int[ndarray, "fact token"],
    *,
    layers: Sequence[int] | None = None,
    final_norm: bool = True,
    masks: SetTokens | None = None,
    top: int = 0,
    batch_size: BatchSize = "auto",
    progress: Progress | None = None,
) -> LensReading:
    """Probability and rank of each fact's tokens at every kind and layer, at two positions.

    One forward per batch, stopped after the last layer; several processes share the batches. A result depends neither
    on the batches nor on the other rows beyond rounding.

    Args:
        model: read as it stands.
        ids: token ids of the prompts, of any lengths.
        subject_last: index of the subject's last token in each of them.
        tokens: ids whose probability is read; -1 for none.
        layers: blocks to read, all by default; the axis `layer` is in this order.
        final_norm: whether values go through the final norm (see the module).
        masks: word sets to average over.
        top: how many of the most probable tokens are kept of every value.
        batch_size: prompts in one forward pass; `auto` goes by their length and the model's size.
        progress: called with (prompts done, prompts in all).

    Raises:
        UnknownSite: the model has no such layer, or none was named.
        BadFact: a position or token that does not exist.
        WorkFailed: the model's numbers are not finite.
    """
    wanted = tuple(model.checked(layer) for layer in (range(model.n_layers) if layers is None else layers))
    if not wanted:
        raise UnknownSite("there are no layers to probe; name at least one")
    tokens = np.asarray(tokens, dtype=np.int64)
    _check(model, ids, subject_last, tokens, batch_size)
    top = min(top, model.vocab_size)
    reading = _empty(len(ids), len(wanted), tokens.shape[1], None if masks is None else masks.n_sets, top)
    longest = max(map(len, ids), default=1)
    size = int(batch_size) if batch_size != "auto" else _rows_at_once(model, longest, len(wanted))
    batches = list(batches_by_length(range(len(ids)), lambda i: len(ids[i]), size))

    def read(rows: list[int]) -> LensReading:
        start, values = _values(model, [ids[i] for i in rows], [subject_last[i] for i in rows], wanted)
        return _read(model, start, values, tokens[rows], final_norm, masks, top, rows)

    parts = map_batches("lens", batches, read, counter(progress, len(ids)))
    for rows, part in zip(batches, parts, strict=True):
        for whole, values in zip(reading, part, strict=True):
            if whole is not None:
                whole[rows] = values
    return reading


def _check(
    model: TracedModel,
    ids: Sequence[Sequence[int]],
    subject_last: Sequence[int],
    tokens: Int[ndarray, "fact token"],
    batch_size: BatchSize,
) -> None:
    """Refuse arguments that would silently read the wrong position."""
    if not len(ids) == len(subject_last) == len(tokens):
        raise BadFact(f"{len(ids)} prompts, {len(subject_last)} positions, {len(tokens)} rows of tokens; give one each")
    for i, (row, last) in enumerate(zip(ids, subject_last, strict=True)):
        if not 0 <= last < len(row):
            raise BadFact(f"prompt {i} has {len(row)} tokens, so no token {last}; count the subject's from 0")
    if tokens.size and not (tokens.min() >= -1 and tokens.max() < model.vocab_size):
        raise BadFact(f"a token id is outside the model's {model.vocab_size} tokens; use the model's own tokenizer")
    checked_size(batch_size)


def _empty(n: int, n_layers: int, n_tokens: int, n_sets: int | None, top: int) -> LensReading:
    shape = (n, len(POSITIONS), len(KINDS), n_layers)
    start = (n, len(POSITIONS), n_tokens)
    return LensReading(
        prob=np.full((*shape, n_tokens), np.nan, np.float32),
        rank=np.full((*shape, n_tokens), -1, np.int32),
        start_prob=np.full(start, np.nan, np.float32),
        start_rank=np.full(start, -1, np.int32),
        sets=None if n_sets is None else np.full((*shape, n_sets), np.nan, np.float32),
        top=np.full((*shape, top), -1, np.int32) if top else None,
        top_prob=np.full((*shape, top), np.nan, np.float32) if top else None,
    )


def _rows_at_once(model: TracedModel, length: int, n_layers: int) -> int:
    """Prompts whose MLP activations and read values fill the memory set aside."""
    config = model.module.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 0
    numbers = length * max(int(inner), 4 * model.d_model) + len(POSITIONS) * len(KINDS) * n_layers * model.d_model
    return max(1, _memory(model) // (numbers * model.dtype.itemsize))


def _memory(model: TracedModel) -> int:
    return _MEMORY.get("cuda" if model.remote else model.device.type, _MEMORY["cpu"])


def _values(
    model: TracedModel, ids: Sequence[Sequence[int]], subject_last: Sequence[int], layers: Sequence[int]
) -> tuple[Float[Tensor, "row position d_model"], Float[Tensor, "row position kind layer d_model"]]:
    """The residual stream that enters block 0, and every site's value, at both positions of every prompt."""
    batch = encode_ids(ids, pad_id(model.tokenizer)).to(model.device)
    positions = torch.tensor([[last, len(row) - 1] for last, row in zip(subject_last, ids, strict=True)])
    columns = (positions + (batch.ids.shape[1] - batch.lengths.cpu())[:, None]).to(model.device)
    every = [Site(kind, layer) for layer in sorted(set(layers)) for kind in (Kind.ATTN, Kind.MLP, Kind.RESID)]
    sites = model.in_order(site for site in every if model.layout.has(site))
    entering: Point = (model.block(0), "input")
    start, *values = model.gather(batch, [entering, *map(model.point, sites)], columns)
    at_site = dict(zip(sites, values, strict=True))
    nothing = torch.zeros_like(values[0])  # what a block without this part adds
    by_kind = [[at_site.get(Site(_SITES[kind], n), nothing).to(model.device) for n in layers] for kind in KINDS]
    return start, torch.stack([torch.stack(values, 2) for values in by_kind], 2)


def _read(
    model: TracedModel,
    start: Float[Tensor, "row position d_model"],
    values: Float[Tensor, "row position kind layer d_model"],
    tokens: Int[ndarray, "row token"],
    final_norm: bool,
    masks: SetTokens | None,
    top: int,
    facts: Sequence[int],
) -> LensReading:
    """The reading of one batch."""
    at_start = _scores(model, start, tokens, final_norm, None, 0, facts)
    at_sites = _scores(model, values, tokens, final_norm, masks, top, facts)
    return LensReading(
        _shaped(at_sites.prob, values),
        _shaped(at_sites.rank, values),
        _shaped(at_start.prob, start),
        _shaped(at_start.rank, start),
        *(None if part is None else _shaped(part, values) for part in at_sites[2:]),
    )


def _scores(
    model: TracedModel,
    vectors: Float[Tensor, "fact *site d_model"],
    tokens: Int[ndarray, "fact token"],
    final_norm: bool,
    masks: SetTokens | None,
    top: int,
    facts: Sequence[int],
) -> _Scores:
    """Eq. 5 and 6 for every vector, as many at a time as the memory for their logits allows."""
    flat = vectors.flatten(0, -2)
    owner = torch.arange(len(facts), device=flat.device).repeat_interleave(len(flat) // len(facts))
    wanted = torch.as_tensor(tokens, device=flat.device)
    size = max(1, _memory(model) // (4 * _COPIES * model.vocab_size))
    parts: list[_Scores] = []
    for chunk in range(0, len(flat), size):
        whose = owner[chunk : chunk + size]
        named = None if masks is None else set_tokens(masks, [facts[i] for i in whose.tolist()])
        reduce = partial(_reduced, tokens=wanted[whose], named=named, top=top)
        total, *found = model.unembed(flat[chunk : chunk + size], final_norm, reduce)
        if not bool(total.isfinite().all()):
            where = facts[int(whose[int((~total.isfinite()).nonzero()[0])])]
            raise WorkFailed(
                f"prompt {where}: the model gives numbers that are not finite; load it with dtype float32 or bfloat16"
            )
        parts.append(_Scores(*found))
    return _Scores(*(None if some[0] is None else torch.cat(some) for some in zip(*parts, strict=True)))  # type: ignore[arg-type]


def _reduced(
    logits: Float[Tensor, "row vocab"], tokens: Int[Tensor, "row token"], named: Any, top: int
) -> tuple[Any, ...]:
    """The scores of logits. A remote model computes them where it runs: no class of this package may occur here."""
    total = logits.logsumexp(-1)
    prob, rank = _of_tokens(logits, total, tokens.to(logits.device))
    tops: tuple[Any, Any] = (None, None)
    if top:
        first, ids = logits.topk(top)
        tops = ids.int().cpu(), (first - total[:, None]).exp().cpu()
    sets = None if named is None else of_sets(logits, total, named)  # last, since it overwrites the logits
    return total.cpu(), prob.cpu(), rank.cpu(), sets, *tops


def _of_tokens(
    logits: Float[Tensor, "row vocab"], total: Float[Tensor, " row"], tokens: Int[Tensor, "row token"]
) -> tuple[Float[Tensor, "row token"], Int[Tensor, "row token"]]:
    """Probability, and how many logits are strictly larger: a count, no sort."""
    token_logits = logits.gather(1, tokens.clamp(min=0))
    above = [(logits > token_logits[:, t : t + 1]).sum(-1) for t in range(tokens.shape[1])]
    rank = torch.stack(above, 1) if above else tokens
    prob = (token_logits - total[:, None]).exp()
    return prob.masked_fill(tokens < 0, torch.nan), rank.masked_fill(tokens < 0, -1).int()


def _shaped(values: Tensor, vectors: Float[Tensor, "fact *site d_model"]) -> ndarray:
    return values.reshape(*vectors.shape[:-1], values.shape[-1]).numpy()
