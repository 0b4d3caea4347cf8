"""Corrupting a prompt's subject: Gaussian noise on its embeddings, or another subject in its place.

Noise has the standard deviation ν = `noise_scale` x the standard deviation over all entries of the embedding rows
of all subjects' tokens (each subject tokenised alone, without special tokens: ROME's rule). The draws of a fact
depend on the seed and on its prompt and subject alone, never on its place among the facts or in a batch, and all
patches of a fact see the same draws.

A swap takes another fact's subject that leaves the number and the places of all tokens as they are; the same
relation with another answer is preferred. It is one corrupted prompt a fact, so it has one sample.
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
from ..model.model import TracedModel
from ..model.tokens import template_span, token_ids
from .prompts import LeftOut, TracePrompt

NO_PARTNER = "no other subject of the same number of tokens"


class Draws(NamedTuple):
    """Noise that is drawn when it is asked for: that of thousands of facts together would fill the memory."""

    seed: int
    level: float
    shape: tuple[int, int, int]

    def tensor(self) -> Float[Tensor, "sample token d_embed"]:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(self.seed)) * self.level


@dataclass(frozen=True)
class Corruption:
    """How one case's prompt is corrupted: noise on the subject's tokens (given or drawn), or other ids there."""

    ids: tuple[int, ...]
    source: Draws | Float[Tensor, "sample token d_embed"] | None
    first: int  # the first corrupted token
    samples: int
    partner: str | None = None

    def noise(self) -> Float[Tensor, "sample token d_embed"] | None:
        """The same at each call."""
        return self.source.tensor() if isinstance(self.source, Draws) else self.source


@torch.no_grad()
def embedding_spread(model: TracedModel, facts: Sequence[Fact]) -> float:
    """Standard deviation over all entries of the embedding module's rows for all subjects' tokens."""
    ids = [t for fact in facts for t in model.tokenizer(fact.subject, add_special_tokens=False)["input_ids"]]
    # Sorted, so that the facts' order cannot move the sum's last digit.
    return float(model.embedded(torch.tensor([sorted(ids)])).cpu().double().std())


def with_noise(
    model: TracedModel, cases: Sequence[TracePrompt], level: float, samples: int, seed: int
) -> list[Corruption]:
    """Noise for every case."""
    width = model.module.get_input_embeddings().weight.shape[1]
    made = []
    for case in cases:
        draws = Draws(fact_seed(case.fact, seed), level, (samples, case.span.stop - case.span.start, width))
        made.append(Corruption(case.ids, draws, case.span.start, samples))
    return made


def given_noise(
    model: TracedModel, cases: Sequence[TracePrompt], noise: Sequence[Any], n_facts: int
) -> list[Corruption]:
    """Use the caller's draws: one (samples, subject tokens, d_model) tensor per fact in the caller's list."""
    if len(noise) != n_facts:
        raise BadFact(f"noise holds {len(noise)} tensors for {n_facts} facts; give one per fact")
    width = model.module.get_input_embeddings().weight.shape[1]
    made = []
    for case in cases:
        draws = torch.as_tensor(noise[case.index])
        wanted = (case.span.stop - case.span.start, width)
        if draws.dim() != 3 or not len(draws) or tuple(draws.shape[1:]) != wanted:
            raise BadFact(
                f"noise for fact {case.index} ({case.fact.prompt!r}) is {tuple(draws.shape)}; "
                f"give (samples, {wanted[0]}, {wanted[1]})"
            )
        made.append(Corruption(case.ids, draws, case.span.start, len(draws)))
    return made


def swapped(
    model: TracedModel, cases: Sequence[TracePrompt], seed: int
) -> tuple[list[TracePrompt], list[Corruption], list[LeftOut]]:
    """Find every case a partner; those without one are left out."""
    kept, made, left_out = [], [], []
    for case in cases:
        corruption = _partner(model.tokenizer, case, cases, seed)
        if corruption is None:
            left_out.append(LeftOut(case.index, case.fact.id, NO_PARTNER))
        else:
            kept.append(case)
            made.append(corruption)
    return kept, made, left_out


def fact_seed(fact: Fact, seed: int, *more: str) -> int:
    """A 63-bit seed from the run's seed and what the fact says."""
    text = "\x1f".join((str(seed), fact.prompt, fact.subject, *more))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _partner(tokenizer: Any, case: TracePrompt, cases: Sequence[TracePrompt], seed: int) -> Corruption | None:
    length = case.span.stop - case.span.start
    others = [c for c in cases if c.fact.subject != case.fact.subject and c.span.stop - c.span.start == length]
    order = sorted(
        others,
        key=lambda c: (
            c.fact.relation != case.fact.relation,
            c.answer_id == case.answer_id,
            fact_seed(case.fact, seed, c.fact.subject),
        ),
    )
    for other in order:
        subject = other.fact.subject
        ids = token_ids(tokenizer, fill(case.fact.template, subject))
        outside = ids[: case.span.start] + ids[case.span.stop :]
        same = case.ids[: case.span.start] + case.ids[case.span.stop :]
        fits = len(ids) == len(case.ids) and tuple(outside) == same
        if fits and template_span(tokenizer, case.fact.template, subject) == case.span:
            first = next((i for i, (a, b) in enumerate(zip(ids, case.ids, strict=True)) if a != b), None)
            if first is not None:
                return Corruption(tuple(ids), None, first, 1, subject)
    return None
