"""Rows of prompts with the column that matters, and the keys and values read there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from ...facts.fact import Fact, fill
from ...model.prefix import saved
from ...model.sites import Site
from ...model.tokens import Batch, encode_ids, pad_id, template_span, token_ids
from .aims import Position
from .contexts import Contexts

if TYPE_CHECKING:
    from ...model.model import TracedModel


TOKENS_PER_FORWARD = 8192


@dataclass(frozen=True)
class Rows:
    """Token rows and, in each, the index (unpadded) of the position of interest."""

    ids: tuple[tuple[int, ...], ...]
    at: tuple[int, ...]

    def batches(
        self, pad: int, tokens: int = TOKENS_PER_FORWARD
    ) -> Iterator[tuple[list[int], Batch, Int[Tensor, " row"]]]:
        """(row numbers, batch, columns) in forwards of at most `tokens` padded tokens, rows of like length together."""
        order = sorted(range(len(self.ids)), key=lambda i: len(self.ids[i]))
        start = 0
        while start < len(order):
            stop = start + 1
            while stop < len(order) and (stop + 1 - start) * len(self.ids[order[stop]]) <= tokens:
                stop += 1
            numbers = order[start:stop]
            batch = encode_ids([self.ids[i] for i in numbers], pad)
            yield numbers, batch, batch.columns([self.at[i] for i in numbers])
            start = stop


def prompt_rows(model: TracedModel, templates: Sequence[tuple[str, str]], position: Position) -> Rows:
    """Rows for (template, subject) pairs."""
    ids, at = [], []
    for template, subject in templates:
        row = tuple(token_ids(model.reader, fill(template, subject)))
        ids.append(row)
        last = position is Position.PROMPT_LAST
        at.append(len(row) - 1 if last else template_span(model.reader, template, subject).last)
    return Rows(tuple(ids), tuple(at))


def read_rows(model: TracedModel, rows: Rows, site: Site, end: str) -> Float[Tensor, "row d"]:
    """The key or value of every row at its position, float32, in the rows' order."""
    out: list[Tensor | None] = [None] * len(rows.ids)
    for numbers, batch, columns in rows.batches(pad_id(model.tokenizer)):
        batch = batch.to(model.device)
        vectors = model.read(batch, [site], end, at=columns)[site].float()  # type: ignore[arg-type]
        for number, vector in zip(numbers, vectors, strict=True):
            out[number] = vector
    return torch.stack([v for v in out if v is not None])


def fact_keys(
    model: TracedModel, facts: Sequence[Fact], contexts: Contexts, site: Site, position: Position
) -> Float[Tensor, "d_in fact"]:
    """One key a fact: the weighted mean over context templates (eq. 10 for W_o; MEMIT eq. 19), float64."""
    return _means(model, facts, contexts, site, position, "key")


def fact_values(
    model: TracedModel, facts: Sequence[Fact], contexts: Contexts, site: Site, position: Position
) -> Float[Tensor, "d_out fact"]:
    """One value a fact: the site's output now, as a mean over contexts (`Contexts()`: the bare prompts), float64."""
    return _means(model, facts, contexts, site, position, "value")


def _means(
    model: TracedModel, facts: Sequence[Fact], contexts: Contexts, site: Site, position: Position, end: str
) -> Float[Tensor, "d fact"]:
    templates = [(t, f.subject) for f in facts for t in contexts.templates(f, model.reader)]
    vectors = read_rows(model, prompt_rows(model, templates, position), site, end)
    vectors = rearrange(vectors, "(fact context) d -> fact context d", fact=len(facts))
    weights = torch.tensor(contexts.weights, dtype=torch.float64, device=vectors.device)
    return einsum(vectors.double(), weights, "fact context d, context -> d fact")


@torch.no_grad()
def values_with(
    model: TracedModel,
    facts: Sequence[Fact],
    sites: Sequence[Site],
    position: Position,
    put: Float[Tensor, "fact d_out"] | None = None,
) -> list[Float[Tensor, "fact d_out"]]:
    """The values at sites, from low to high, of the bare prompts, float32; `put` is in place at the first of them."""
    rows = prompt_rows(model, [(fact.template, fact.subject) for fact in facts], position)
    found = [torch.zeros(len(facts), model.d_model, device=model.device) for _ in sites]
    for numbers, batch, columns in rows.batches(pad_id(model.tokenizer)):
        batch = batch.to(model.device)
        size, every = len(numbers), torch.arange(len(numbers))
        read: list[Tensor] = []
        with model.nnsight.trace(**model.inputs(batch)) as tracer:
            for number, site in enumerate(sites):
                value: Any = model.value(site, size)
                where = every.to(value.device), columns.to(value.device)
                if put is not None and number == 0:
                    value[where] = put[numbers].to(value.device, value.dtype)
                read.append(saved(value[where].clone()))
            tracer.stop()
        for whole, part in zip(found, read, strict=True):
            whole[numbers] = part.to(whole)
    return found
