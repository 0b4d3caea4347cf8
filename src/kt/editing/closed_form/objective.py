"""The objective of a target search: a tuple of terms, each one small class, and the optimiser's steps.

    loss = -log p(target) + kl_factor · KL(now ‖ before) + Σ decay · ‖δ‖ / ‖v‖²

A term may add to the loss, end a request's search, or pull δ back after a step. A new one is a subclass of `Term` with
the one method that it needs, listed in a method's `objective`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from ...model.sites import Kind
from .aims import TargetSite


class SearchStep(NamedTuple):
    """One step of the search: its readings of the requests that are still searched for.

    Attributes:
        nll: mean -log p of the target's tokens, by context.
        essence: log-probabilities after the essence prompt; None where no essence rows were run.
        unedited: the same without δ.
        all_argmax: every target token is the likeliest in every context.
        was_argmax: the same at the step before; false at the first.
        argmax_steps: the steps so far, this one included, at which they were.
        delta, before: δ and the value that it is added to, by target site.
        above: the stream behind the layers above the first target, at its token; None where no term reads it.
        drift: how far attention weights went from where they were (`target_forward.drift`); None where none was read.
    """

    nll: Float[Tensor, "fact context"]
    essence: Float[Tensor, "fact vocab"] | None
    unedited: Float[Tensor, "fact vocab"] | None
    all_argmax: Bool[Tensor, " fact"]
    was_argmax: Bool[Tensor, " fact"]
    argmax_steps: Int[Tensor, " fact"]
    delta: Mapping[TargetSite, Float[Tensor, "fact d_model"]]
    before: Mapping[TargetSite, Float[Tensor, "fact d_model"]]
    above: Float[Tensor, "layer fact context d_model"] | None = None
    drift: Float[Tensor, " fact"] | None = None

    @property
    def prob(self) -> Float[Tensor, " fact"]:
        """The target's probability, a token's on average, as a mean over contexts."""
        return (-self.nll).exp().mean(-1)

    @property
    def divergence(self) -> Float[Tensor, " fact"]:
        """KL(now ‖ unedited) after the essence prompt, in nats; zero where no essence rows were run."""
        if self.essence is None or self.unedited is None:
            return torch.zeros_like(self.nll[:, 0])
        return (self.essence.exp() * (self.essence - self.unedited)).sum(-1)


class Term:
    """One part of an objective. A subclass overrides the methods that it needs."""

    @property
    def reads_essence(self) -> bool:
        """Whether it needs the essence rows."""
        return False

    @property
    def layers_above(self) -> int:
        """Of how many layers above the first target it reads the stream."""
        return 0

    @property
    def reads_attention(self) -> bool:
        """Whether it needs attention weights, which only eager attention gives."""
        return False

    def loss(self, step: SearchStep) -> Float[Tensor, " fact"] | None:
        """The term's part of each request's loss; None where it has none."""

    def done(self, step: SearchStep, loss: Float[Tensor, " fact"]) -> Bool[Tensor, " fact"] | None:
        """The requests whose searches end here, as a mask; None if the term ends none."""

    def bounded(
        self, target: TargetSite, delta: Float[Tensor, "fact d_model"], before: Float[Tensor, "fact d_model"]
    ) -> Float[Tensor, "fact d_model"]:
        """δ after a step of the optimiser."""
        return delta


@dataclass(frozen=True)
class NLL(Term):
    """-log p(target), a mean over its tokens and over contexts (ROME eq. 4; MEMIT eq. 16)."""

    def loss(self, step: SearchStep) -> Float[Tensor, " fact"]:
        return step.nll.mean(-1)


@dataclass(frozen=True)
class DiscountedNLL(Term):
    """The same, counted `factor` times after a step at which every target token was the likeliest (PMET's code)."""

    factor: float = 0.1

    def loss(self, step: SearchStep) -> Float[Tensor, " fact"]:
        nll = step.nll.mean(-1)
        return torch.where(step.was_argmax, self.factor, 1.0) * nll


@dataclass(frozen=True)
class KL(Term):
    """factor · KL(now ‖ unedited) of the words after "{subject} is a" (ROME eq. 4, JEEP eq. 11)."""

    factor: float = 0.0625

    @property
    def reads_essence(self) -> bool:
        return self.factor != 0

    def loss(self, step: SearchStep) -> Float[Tensor, " fact"]:
        return self.factor * step.divergence


@dataclass(frozen=True)
class WeightDecay(Term):
    """Σ over targets of factor · ‖δ‖ / ‖v‖² (ROME's code); a target site's own decay comes first."""

    factor: float = 1e-3

    def loss(self, step: SearchStep) -> Float[Tensor, " fact"] | None:
        parts = []
        for target, delta in step.delta.items():
            factor = self.factor if target.decay is None else target.decay
            parts.append(factor * (delta.norm(dim=-1) / step.before[target].norm(dim=-1) ** 2))
        return sum(parts[1:], parts[0])


@dataclass(frozen=True)
class AttentionDrift(Term):
    """factor · 1e-4 · Σ over layers and heads of KL(attention before ‖ now) at the prompt's last token, of the heads
    whose weight on the subject's last token is above all heads' before (SADR, arXiv 2502.14838, and its code)."""

    factor: float

    @property
    def reads_attention(self) -> bool:
        return self.factor != 0

    def loss(self, step: SearchStep) -> Float[Tensor, " fact"] | None:
        return None if step.drift is None else self.factor * 1e-4 * step.drift


@dataclass(frozen=True)
class ClampNorm(Term):
    """‖δ‖ ≤ factor · ‖v‖ after each step (JEEP eq. 12); a target site's own bound comes first."""

    factor: float = 4.0

    def bounded(
        self, target: TargetSite, delta: Float[Tensor, "fact d_model"], before: Float[Tensor, "fact d_model"]
    ) -> Float[Tensor, "fact d_model"]:
        longest = (self.factor if target.clamp is None else target.clamp) * before.norm(dim=-1, keepdim=True)
        return delta * (longest / delta.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1)


@dataclass(frozen=True)
class StopBelow(Term):
    """A request stops at a loss below `loss_bound` (0.05 in ROME's and MEMIT's code)."""

    loss_bound: float = 5e-2

    def done(self, step: SearchStep, loss: Float[Tensor, " fact"]) -> Bool[Tensor, " fact"]:
        return loss < self.loss_bound


@dataclass(frozen=True)
class StopAtProbability(Term):
    """A request stops when its target's mean probability over contexts reaches `prob` (JEEP's `min_loss`)."""

    prob: float = 0.9

    def done(self, step: SearchStep, loss: Float[Tensor, " fact"]) -> Bool[Tensor, " fact"]:
        return step.prob >= self.prob


@dataclass(frozen=True)
class StopAtArgmax(Term):
    """A request stops once every target token is the likeliest and the weighted KL is at most 0.01 (PMET's code)."""

    kl_factor: float = 0.0625
    most: float = 0.01

    def done(self, step: SearchStep, loss: Float[Tensor, " fact"]) -> Bool[Tensor, " fact"]:
        return step.all_argmax & (self.kl_factor * step.divergence <= self.most)


@dataclass(frozen=True)
class StopAfterArgmax(Term):
    """A request stops at its `steps`-th step at which every target token is the likeliest (ENCORE's MPES)."""

    steps: int = 2

    def done(self, step: SearchStep, loss: Float[Tensor, " fact"]) -> Bool[Tensor, " fact"]:
        return step.argmax_steps >= self.steps


@dataclass(frozen=True)
class Aligned(Term):
    """δ of one request lies to the earlier requests' δ as its key lies to theirs (EAMET).

    With s the cosines of its key to the earlier keys, r those of δ to the earlier δ, and p, q their softmax at `tau`:
    `divergence` · KL(p ‖ q) + `squares` · Σ p′ (s - r)² over the `NEAREST` largest s, p′ their softmax.
    """

    similarity: Float[Tensor, " earlier"]
    deltas: Float[Tensor, "earlier d_model"]
    divergence: float
    squares: float
    tau: float

    def loss(self, step: SearchStep) -> Float[Tensor, " fact"] | None:
        ((_, delta),) = step.delta.items()
        if not len(self.deltas) or not bool(delta.any()):  # nothing to lie to; no direction yet
            return None
        cosines = functional.normalize(delta, dim=-1) @ functional.normalize(self.deltas.to(delta), dim=-1).T
        similarity = self.similarity.to(delta)
        p, q = (similarity / self.tau).softmax(-1), (cosines / self.tau).softmax(-1)
        divergence = (p * ((p + EAMET_TINY) / (q + EAMET_TINY)).log()).sum(-1)
        near = similarity.topk(min(NEAREST, len(similarity))).indices
        weights = (similarity[near] / self.tau).softmax(-1)
        squares = (weights * (similarity[near] - cosines[:, near]).square()).sum(-1)
        return self.divergence * divergence + self.squares * squares


@dataclass(frozen=True)
class ContextVariance(Term):
    """factor · mean over layers above of Σ_{i<j} ‖h_i - h_j‖² / d, over contexts (CORE).

    The sum is in the stream's own units and grows with the number of contexts. Automatic: each layer's sum over the
    number of pairs and over the mean square of its elements, which is 2 for contexts that have nothing in common.
    """

    factor: float | Literal["auto"] = "auto"
    layers: int = 28

    @property
    def layers_above(self) -> int:
        return 0 if self.factor == 0 else self.layers

    def loss(self, step: SearchStep) -> Float[Tensor, " fact"] | None:
        if step.above is None or not len(step.above):
            return None
        streams, count = step.above, step.above.shape[2]
        pairs = (count * streams.square().sum((2, 3)) - streams.sum(2).square().sum(-1)) / streams.shape[-1]
        if self.factor != "auto":
            return self.factor * pairs.mean(0)
        square = streams.detach().square().mean((2, 3))
        return (pairs / (max(1, count * (count - 1) / 2) * square)).mean(0)


@dataclass(frozen=True)
class Alignment:
    """EAMET's weights: of the divergence and of the squares, and the softmax's temperature."""

    divergence: float = 1.0
    squares: float = 1.0
    tau: float = 0.07

    def term(self, keys: Float[Tensor, "d_in seen"], deltas: Float[Tensor, "earlier d_model"]) -> Aligned:
        """The term of the last of the keys' requests."""
        unit = functional.normalize(keys, dim=0)
        return Aligned(unit[:, :-1].T @ unit[:, -1], deltas, self.divergence, self.squares, self.tau)


NEAREST = 50
"""Earlier requests that EAMET's squares are over, at most."""
EAMET_TINY = 1e-8
"""Added to probabilities, as EAMET's code does."""

STREAM_STEP, OUTPUT_STEP = 0.25, 0.5
"""An automatic rate over the standard deviation of v's elements, in the residual stream and at a module's own output,
which is a small part of the stream that it has to change. The deviation is taken from the elements' median: a few
elements of a stream can be hundreds of times the others, and make nearly all of its norm."""
NORMAL_MEDIAN = 0.6745
"""Median of |x| over the standard deviation of x, of a normal x."""


@dataclass(frozen=True)
class Objective:
    """How targets are searched for: Adam over `terms`, `steps` forwards and one update fewer, at rate `lr`.

    Adam moves every element of δ by about `lr` a step. The automatic rate follows from a typical element of v, for each
    request and target site, whatever the model's scale.
    """

    terms: tuple[Term, ...] = (NLL(), KL(), WeightDecay(), ClampNorm(), StopBelow())
    steps: int = 25
    lr: float | Literal["auto"] = 0.5

    def rates(self, target: TargetSite, before: Float[Tensor, "fact d_model"]) -> Float[Tensor, "fact one"]:
        """Adam's rate for each request."""
        if self.lr != "auto":
            return torch.full_like(before[:, :1], self.lr)
        typical = before.abs().median(-1, keepdim=True).values / NORMAL_MEDIAN
        step = STREAM_STEP if target.site.kind is Kind.RESID else OUTPUT_STEP
        return step * torch.where(typical > 0, typical, before.square().mean(-1, keepdim=True).sqrt())

    @property
    def reads_essence(self) -> bool:
        return any(term.reads_essence for term in self.terms)

    @property
    def layers_above(self) -> int:
        return max(term.layers_above for term in self.terms)

    @property
    def reads_attention(self) -> bool:
        return any(term.reads_attention for term in self.terms)

    def loss(self, step: SearchStep) -> Float[Tensor, " fact"]:
        parts = [part for term in self.terms if (part := term.loss(step)) is not None]
        return sum(parts[1:], parts[0])

    @torch.no_grad()
    def done(self, step: SearchStep, loss: Float[Tensor, " fact"]) -> Bool[Tensor, " fact"]:
        ended = torch.zeros_like(step.all_argmax)
        for term in self.terms:
            if (done := term.done(step, loss)) is not None:
                ended = ended | done
        return ended

    def bounded(
        self, target: TargetSite, delta: Float[Tensor, "fact d_model"], before: Float[Tensor, "fact d_model"]
    ) -> Float[Tensor, "fact d_model"]:
        for term in self.terms:
            delta = term.bounded(target, delta, before)
        return delta
