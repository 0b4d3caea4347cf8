"""Corrupting a prompt's subject: Gaussian noise on its embeddings, or another subject in its place.

Noise has the standard deviation ν = `noise_scale` x the standard deviation over all entries of the embedding rows
of all subjects' tokens (each subject tokenised alone, without special tokens: ROME's rule). A fact's draws depend on
the seed, its prompt and its subject only, not on the other facts or the batch, and all its patches see the same draws.

A swap uses another fact's subject that keeps the number and positions of all tokens; it prefers the same relation with
another answer. A swap makes one corrupted prompt per fact, so it has one sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import BadFact
from ..facts.fact import Fact, fill
from ..model.chat import in_turn
from ..model.model import TracedModel
from ..model.tokens import template_span, token_ids
from .prompts import LeftOut, TracePrompt

NO_PARTNER = "no other subject of the same number of tokens"


class Draws(NamedTuple):
    """Noise that is drawn on use: the noise of thousands of facts together would fill the memory."""

    seed: int
    level: float
    shape: tuple[int, int, int]

    def tensor(self) -> Float[Tensor, "sample token d_embed"]:
        """Draw the noise; every call gives the same numbers."""
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(self.seed)) * self.level


@dataclass(frozen=True)
class Corruption:
    """One prompt's corruption: noise on the subject's tokens (given or drawn), or other token ids there."""

    ids: tuple[int, ...]
    source: Draws | Float[Tensor, "sample token d_embed"] | None
    first: int  # the first corrupted token
    samples: int
    partner: str | None = None

    def noise(self) -> Float[Tensor, "sample token d_embed"] | None:
        """The draws, the same at each call; None for a swap."""
        return self.source.tensor() if isinstance(self.source, Draws) else self.source


@torch.no_grad()
def embedding_spread(model: TracedModel, facts: Sequence[Fact]) -> float:
    """Standard deviation over all entries of the embedding module's rows for all subjects' tokens."""
    ids = [t for fact in facts for t in model.tokenizer(fact.subject, add_special_tokens=False)["input_ids"]]
    ids = [t for t in ids if model.why_unreadable([t]) is None]  # of facts that are left out
    # Sorted, so that the facts' order cannot change the sum's last digit.
    return float(model.embedded(torch.tensor([sorted(ids)])).cpu().double().std())


def with_noise(
    model: TracedModel, cases: Sequence[TracePrompt], level: float, samples: int, seed: int
) -> list[Corruption]:
    """Noise with standard deviation `level` for every prompt, `samples` draws each."""
    width = model.embedding.weight.shape[1]
    corruptions = []
    for case in cases:
        draws = Draws(fact_seed(case.fact, seed), level, (samples, case.span.stop - case.span.start, width))
        corruptions.append(Corruption(case.ids, draws, case.span.start, samples))
    return corruptions


def given_noise(
    model: TracedModel, cases: Sequence[TracePrompt], noise: Sequence[Any], n_facts: int
) -> list[Corruption]:
    """Use the caller's draws: one (samples, subject tokens, d_model) tensor per fact in the caller's list.

    Raises:
        BadFact: the number or a shape of the tensors does not fit the facts.
    """
    if len(noise) != n_facts:
        raise BadFact(f"noise holds {len(noise)} tensors for {n_facts} facts; give one per fact")
    width = model.embedding.weight.shape[1]
    corruptions = []
    for case in cases:
        draws = torch.as_tensor(noise[case.index])
        n_tokens = case.span.stop - case.span.start
        if draws.dim() != 3 or not len(draws) or tuple(draws.shape[1:]) != (n_tokens, width):
            raise BadFact(
                f"noise for fact {case.index} ({case.fact.prompt!r}) is {tuple(draws.shape)}; "
                f"give (samples, {n_tokens}, {width})"
            )
        corruptions.append(Corruption(case.ids, draws, case.span.start, len(draws)))
    return corruptions


def swapped(
    model: TracedModel, cases: Sequence[TracePrompt], seed: int
) -> tuple[list[TracePrompt], list[Corruption], list[LeftOut]]:
    """Swap every prompt's subject; prompts without a fitting other subject are left out."""
    kept, corruptions, left_out = [], [], []
    for case in cases:
        corruption = _partner(model.reader, case, cases, seed)
        if corruption is None:
            left_out.append(LeftOut(case.index, case.fact.id, NO_PARTNER))
        else:
            kept.append(case)
            corruptions.append(corruption)
    return kept, corruptions, left_out


def fact_seed(fact: Fact, seed: int, *more: str) -> int:
    """A 63-bit seed from the run's seed and the fact's prompt and subject."""
    text = "\x1f".join((str(seed), fact.prompt, fact.subject, *more))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _partner(tokenizer: Any, case: TracePrompt, cases: Sequence[TracePrompt], seed: int) -> Corruption | None:
    start, stop = case.span.start, case.span.stop
    others = [c for c in cases if c.fact.subject != case.fact.subject and c.span.stop - c.span.start == stop - start]
    others.sort(
        key=lambda c: (
            c.fact.relation != case.fact.relation,
            c.answer_id == case.answer_id,
            fact_seed(case.fact, seed, c.fact.subject),
        )
    )
    for other in others:
        subject = other.fact.subject
        template = in_turn(tokenizer, case.fact.template, case.fact.prompt)
        ids = [*token_ids(tokenizer, fill(template, subject)), *case.ids[len(case.ids) - case.at :]]
        fits = len(ids) == len(case.ids) and (*ids[:start], *ids[stop:]) == case.ids[:start] + case.ids[stop:]
        if fits and template_span(tokenizer, template, subject) == case.span:
            first = next((i for i, (a, b) in enumerate(zip(ids, case.ids, strict=True)) if a != b), None)
            if first is not None:
                return Corruption(tuple(ids), None, first, 1, subject)
    return None
