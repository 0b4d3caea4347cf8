"""Knowledge neurons (Dai et al. 2022, arXiv 2104.08696): which MLP neurons an answer's probability is due to.

A neuron is one input of a layer's down_proj at one token of the prompt. With w̄ the layer's neurons there, and P(α) the
probability of the answer's first token where they are α w̄ and everything before them is as it was, integrated gradients
give neuron i

    Attr_i = w̄_i ∫₀¹ ∂P/∂w_i (α w̄) dα,   so that   Σ_i Attr_i = P(1) - P(0)

The layer's neurons are scaled together, as in the authors' code; the paper scales one alone, and its attributions then
sum to nothing in particular. The integral is taken by Gauss and Legendre's rule (the paper: a Riemann sum of 20), and
`gap` is what the sum misses. A fact's knowledge neurons have at least `threshold` of its largest attribution, at the
prompt and at its paraphrases, in a share of these texts of `shared` at least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from .._util.kinds import takes
from .._util.notebook_bar import with_bar
from .._util.progress import Progress
from ..errors import BadFact, KtError
from ..facts.fact import Fact
from ..facts.load import FactsLike, facts_from
from ..model.devices import require_gradients
from ..model.effects import refuse_text
from ..model.model import TracedModel
from ..model.prefix import saved
from ..model.sites import Kind, Site
from ..report import Column, Figure, Shown, Table
from ..report.table import shown as short
from ..stats import bootstrap_mean, bootstrap_mean_grid
from .attribution import Prompts, Shared, forward_arguments
from .prompts import TracePrompt, prepare, why

TOKENS = ("last", "subject_last")


class Attributions(NamedTuple):
    """One prompt: each neuron's attribution, the answer's probability, and that without a layer's neurons."""

    values: Float[ndarray, "layer neuron"]
    prob: float
    without: Float[ndarray, " layer"]

    @property
    def gap(self) -> float:
        """The largest |Σ Attr - (P(1) - P(0))| of a layer."""
        return float(np.abs(self.values.sum(1, dtype=np.float64) - (self.prob - self.without)).max())


@dataclass(frozen=True)
class FactNeurons:
    """A fact's attributions at its prompt, and its neurons (layer, neuron), the largest first."""

    fact: Fact
    answer: str
    found: Attributions
    texts: int
    neurons: tuple[tuple[int, int], ...]

    def as_dict(self) -> dict[str, Any]:
        own = [{"layer": i, "neuron": n, "attribution": float(self.found.values[i, n])} for i, n in self.neurons]
        sums = self.found.values.sum(1, dtype=np.float64).tolist()
        about = {"id": self.fact.id, "prompt": self.fact.prompt, "answer": self.answer, "texts": self.texts}
        numbers = {"prob": self.found.prob, "without": self.found.without.tolist(), "by_layer": sums}
        return about | numbers | {"gap": self.found.gap, "neurons": own}


@dataclass(frozen=True)
class KnowledgeNeurons(Shown):
    """The neurons of some facts."""

    facts: tuple[FactNeurons, ...]
    metadata: dict[str, Any]

    kind = "neurons"

    @property
    def seed(self) -> int:
        """Of the intervals' bootstrap."""
        return int(self.metadata["seed"])

    @property
    def by_layer(self) -> Float[ndarray, "fact layer"]:
        """Σ_i Attr_i: what the answer's probability owes to a layer's neurons."""
        return np.stack([each.found.values.sum(1, dtype=np.float64) for each in self.facts])

    @property
    def counts(self) -> Float[ndarray, "fact layer"]:
        """Knowledge neurons of each layer."""
        layers = range(self.by_layer.shape[1])
        return np.array([[sum(i == layer for i, _ in each.neurons) for layer in layers] for each in self.facts], float)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return self.metadata | {"kind": self.kind, "facts": [each.as_dict() for each in self.facts]}

    def tables(self) -> Sequence[Table]:
        """A row a layer, and a row a fact."""
        rows = [
            [layer, *(bootstrap_mean(values[:, layer], seed=self.seed) for values in (self.by_layer, self.counts))]
            for layer in range(self.by_layer.shape[1])
        ]
        gap = max(each.found.gap for each in self.facts)
        note = f"P: probability of the answer's first token; the attributions of a layer miss it by {gap:.1e} at most"
        layers = Table(
            ["layer", "P due to its neurons [95%]", "knowledge neurons [95%]"], rows, "neurons by layer", note
        )
        best = Column("largest", lambda pairs: ", ".join(f"{layer}:{n}" for layer, n in pairs) or "none")
        facts = [[short(e.fact.prompt), e.answer, e.found.prob, len(e.neurons), e.neurons[:5]] for e in self.facts]
        return [
            layers,
            Table(["prompt", "answer", "P", "knowledge neurons", best], facts, "neurons by fact (layer:neuron)"),
        ]

    def figures(self) -> Sequence[Figure]:
        """What the answer's probability owes to each layer."""
        from ..figures.curves import Series, curves

        grid = bootstrap_mean_grid(self.by_layer, seed=self.seed) if len(self.facts) > 1 else None
        mean = self.by_layer.mean(0)
        low, high = (mean, mean) if grid is None else (grid.low, grid.high)
        line = Series("mlp", list(range(len(mean))), mean.tolist(), low.tolist(), high.tolist())
        title = "What an answer's probability is due to, by layer"
        return [Figure(curves([line], title=title, y_title="attribution"), name="neurons")]


@takes()
@with_bar("knowledge neurons")
def knowledge_neurons(
    model: TracedModel,
    facts: FactsLike,
    *,
    steps: int = 20,
    threshold: float = 0.2,
    shared: float = 0.7,
    at: str = "last",
    progress: Progress | None = None,
    seed: int = 0,
) -> KnowledgeNeurons:
    """Attribute the facts' answers to MLP neurons by integrated gradients.

    Args:
        model: the loaded model, as `kt.load` returns it.
        facts: as for `causal_trace`; those with an answer are asked about.
        steps: points of the integral, a row of a forward each.
        threshold: of a prompt's largest attribution, for a neuron to count there (the paper's 0.2).
        shared: share of a fact's texts (prompt and paraphrases) at which its neurons have to count (the paper's 0.7).
        at: the token whose neurons are asked about: the prompt's `last`, where the answer is predicted, as in the
            paper, or the subject's last (`subject_last`; paraphrases name no subject's place and are not asked then).
        seed: of the intervals' bootstrap; attributions do not depend on it.

    Returns:
        By fact its neurons, and every neuron's attribution as (layer, neuron), in units of probability.

    Raises:
        KtError: a number outside its range, a model on another machine, or one to which an edit is applied that puts
            text before prompts.
        BadFact: no fact can be asked about.

    Examples:
        >>> neurons = kt.knowledge_neurons(model, facts[:1], steps=4)
        >>> neurons.by_layer.shape  # fact, layer
        (1, 8)
    """
    refuse_text(model, "an attribution to neurons")
    if at not in TOKENS:
        raise KtError(f"at is {at!r}; give {' or '.join(TOKENS)}")
    for name, value in {"threshold": threshold, "shared": shared}.items():
        if not 0 < value <= 1:
            raise KtError(f"{name} {value:g} must be a share above 0, at most 1")
    if steps < 1:
        raise KtError(f"steps {steps} must be at least 1: the points of the integral")
    model.require_weights("attributing an answer to neurons")
    require_gradients("attributing an answer to neurons")
    plain = [n for n in model.layers_with(Kind.MLP) if model.layout.at(n).mixture is None]
    widths = {model.key_size(Site(Kind.MLP, layer)) for layer in plain}
    if len(plain) < model.n_layers or len(widths) > 1:
        raise KtError(
            f"knowledge neurons are those of dense MLPs of one width in every block, and {model.name} has "
            f"{model.layout.describe()}; trace mlp, or experts (kinds=('experts',))"
        )
    cases, left_out = prepare(model, facts_from(facts), 16)
    if not cases:
        raise BadFact(f"no fact to attribute ({why(left_out)}); give other facts")
    found = []
    for number, case in enumerate(cases):
        column = case.span.last if at == "subject_last" else len(case.ids) - 1
        prompts = [(case, column)] + [(c, len(c.ids) - 1) for c in _paraphrased(model, case) if at == "last"]
        each = [attributions(model, c.ids, case.answer_id, column, steps) for c, column in prompts]
        counts = np.mean([a.values >= threshold * a.values.max() for a in each], 0) >= shared
        places = [(int(i), int(n)) for i, n in np.argwhere(counts & (each[0].values > 0))]
        places.sort(key=lambda place: -each[0].values[place])
        found.append(FactNeurons(case.fact, case.answer, each[0], len(each), tuple(places)))
        if progress:
            progress(number + 1, len(cases))
    about = {"model": model.name, "steps": steps, "threshold": threshold, "shared": shared, "at": at}
    about["seed"] = seed
    return KnowledgeNeurons(tuple(found), about | {"left_out": [fact._asdict() for fact in left_out]})


def _paraphrased(model: TracedModel, case: TracePrompt) -> list[TracePrompt]:
    """The fact's paraphrases as prompts of their own."""
    own = [Fact("{}", text, answer=case.answer, foil=case.foil) for text in case.fact.paraphrases]
    return [replace(each, answer_id=case.answer_id) for each in prepare(model, own, 16)[0]]


def attributions(model: TracedModel, ids: Sequence[int], answer: int, column: int, steps: int = 20) -> Attributions:
    """Integrated gradients of an answer token's probability at one token's neurons, layer by layer.

    Args:
        answer: the token whose probability after the prompt is attributed.
        column: the prompt's token whose neurons are scaled.

    Returns:
        Attributions, P(1), and P(0) by layer, all in units of probability.
    """
    nodes, weights = (torch.tensor(each) / 2 for each in np.polynomial.legendre.leggauss(steps))
    scales = torch.cat([nodes + 0.5, torch.tensor([0.0, 1.0])]).to(model.device)
    row = torch.tensor([list(ids)], device=model.device)
    index, asked, fact = torch.tensor([answer]), torch.tensor([[answer]]), torch.tensor([0])
    left = Shared.left_of(model, Prompts(row, None, asked, index, fact), column)
    many = len(scales)
    prompts = Prompts(row.expand(many, -1), None, asked.expand(many, 1), index.expand(many), fact.expand(many))
    values, without, prob = [], [], 0.0
    for layer in range(model.n_layers):
        with torch.enable_grad(), model.nnsight.trace(**forward_arguments(model, prompts, left)):
            x: Any = model.key(Site(Kind.MLP, layer), many).detach()
            neurons = saved(x[:, column - left.start].clone())
            leaf = saved((neurons * scales[:, None].to(x)).requires_grad_())
            there = torch.arange(x.shape[1], device=x.device)[:, None] == column - left.start
            down: Any = model.projection(Kind.MLP, layer)
            down.input = torch.where(there, leaf[:, None], x).view_as(down.input)
            logits = saved(model.last_logits()[:, -1])
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        p = wide.softmax(-1)[:, answer]
        gradient = torch.autograd.grad(p.sum(), leaf)[0][:-2]
        integral = (weights.to(gradient.device)[:, None] * gradient.double()).sum(0)
        values.append((neurons[-1].double() * integral).cpu().numpy())
        without.append(float(p[-2].detach()))
        prob = float(p[-1].detach())
    return Attributions(np.stack(values), prob, np.array(without))
