"""UltraEdit: one forward, one backward, one closed form (Gu et al. 2025, arXiv 2505.14679, and its authors' code).

No target is searched for, no second moment is taken, no subject is looked up. Every token of the answers, teacher-
forced, gives a pair at the position that predicts it: h, the input of an edited projection, and g, the gradient of the
answers' -log p with respect to its output. With μ and σ over all pairs of the session so far, this edit's included,

    ẑ = (z - μ) / (σ + ε),  z = [h, g]         lifelong normalisation
    v = -lr · ‖ĥ‖² · ĝ                         the wanted change of the projection's output for input h
    ΔW = V Hᵀ (H Hᵀ + ridge · I)⁻¹             on the h as they are; the authors' ridge is 1

`lr="auto"` starts from Polyak's step on ΔW, all weights together: with ΔW₁ the updates of lr = 1, token i of the
answers reaches -log p = 0, to first order, at lr = f_i / d_i, f = -log p, d = -Σ_weights g · ΔW₁ h. The start is the
smallest rate at which `WANTED` of the tokens do, but at most `MOST` times mean(f) / mean(d): it follows the gradients'
size, the number of weights and what the ridge lets through, and a few tokens that no rate moves do not make it endless.
A token of -log p 17 does not fall in a straight line, though. So the edited model is asked: the rate is the first of
the start times √2ᵏ at which it says `WANTED` of the answers, each token the likeliest one; where none does, that with
the most, and of these the one that makes the answers likeliest. Many answers may ask for a rate that wrecks the model,
so it grows no further once perplexity on the text of `verdict` is `MOST_HARM` times that before.

All weights are solved on the model as it is, from the same pass. ẑ is centred: what all pairs share is taken away, so a
lone pair moves nothing, and few say little.

Two things are not as in the authors' code, so that batching does not change the result. The loss is a sum over tokens;
theirs is a mean over a mini-batch's, so that a pair weighs by how many share its mini-batch (ẑ takes only a common
factor out again). The variance is exact; theirs counts each mini-batch of n pairs n/(n-1) times. A first edit that is
one mini-batch comes out the same in both, but for a factor (1 - 1/n)^1.5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float, Int
from scipy.linalg import lapack
from torch import Tensor

from .._util.progress import Progress
from ..errors import WorkFailed, warn_user
from ..facts.fact import Fact
from ..facts.load import load_facts
from ..model.memory import require_memory
from ..model.sites import Site
from ..model.tokens import Batch, pad_id, target_ids, token_ids, wanted_ids
from ..model.update import Dense, LowRank, Update
from .closed_form.auto_ridge import WANTED, Spectrum, auto_ridge
from .closed_form.keys import Rows
from .plan import PlanText, SolveContext, SolveResult, WeightUpdate, WithoutSearch
from .rounding import target_scores
from .verdict import read_text

if TYPE_CHECKING:
    from ..model.model import TracedModel


MOST = 5.0
"""An automatic rate, at most: times the one that takes the tokens' mean -log p away."""

RATES = 6
"""Rates that an automatic one is chosen among, each √2 times the one before."""

MOST_HARM = 2.0
"""The largest ratio of perplexity to that before with which an automatic rate grows beyond its start. What
more would bring, and cost, on a hundred facts of SmolLM2: docs/methods-measured.md."""

GATED = ("mlp.gate_proj", "mlp.up_proj")
"""What the original writes in Llama-3, Qwen2.5 and Gemma 3; in GPT-J, Mistral and Phi-4 it writes down_proj."""

LEAST_VARIANCE = 1e-6
"""The least eigenvalue that StableEdit whitens with, over the largest. Its code has 1e-6, whatever the gradients'
scale."""

RAISE = "raise L2 (--set L2=VALUE)"
"""The remedy of a singular system: UltraEdit's ridge is the setting L2."""

EPSILON = float(np.finfo(np.float32).eps)
"""Added to σ, as in the authors' code: a number that never varies is normalised to zero."""


@dataclass(frozen=True)
class Running:
    """Mean and scatter (the sum of squared distances from it) of all features seen so far, in float64."""

    count: int
    mean: Float[Tensor, " feature"]
    scatter: Float[Tensor, " feature"]

    @classmethod
    def of(cls, features: Float[Tensor, "pair feature"]) -> Running:
        features = features.double()
        mean = features.mean(0)
        return cls(len(features), mean, (features - mean).square().sum(0))

    def merged(self, other: Running) -> Running:
        """Both together, by the parallel rule (Chan, Golub and LeVeque 1979): exact, in whatever pieces they came."""
        count, apart = self.count + other.count, other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        return Running(count, mean, self.scatter + other.scatter + apart**2 * (self.count * other.count / count))

    def normalised(self, features: Float[Tensor, "pair feature"]) -> Float[Tensor, "pair feature"]:
        deviation = (self.scatter / max(self.count - 1, 1)).sqrt()
        return (features - self.mean) / (deviation + EPSILON)


@dataclass(frozen=True)
class Whitening(Running):
    """StableEdit's statistics: of the gradients the whole scatter matrix is kept.

    Once more than d_out + 1 pairs are seen, gradients are normalised as (g - μ) Σ^(-1/2), Σ the scatter over
    n - d_out - 1, its eigenvalues at least `LEAST_VARIANCE` of the largest; before, element by element, as UltraEdit's.
    """

    gradients: Float[Tensor, "d_out d_out"]

    @classmethod
    def of_pairs(cls, pairs: Pairs) -> Whitening:
        plain, apart = Running.of(pairs.features), pairs.gradients.double()
        apart = apart - apart.mean(0)
        return cls(plain.count, plain.mean, plain.scatter, apart.T @ apart)

    def merged(self, other: Running) -> Whitening:
        assert isinstance(other, Whitening)
        plain, size = super().merged(other), len(self.gradients)
        apart = (other.mean - self.mean)[-size:]
        between = torch.outer(apart, apart) * (self.count * other.count / plain.count)
        return Whitening(plain.count, plain.mean, plain.scatter, self.gradients + other.gradients + between)

    @property
    def whitens(self) -> bool:
        return self.count > len(self.gradients) + 1

    def normalised(self, features: Float[Tensor, "pair feature"]) -> Float[Tensor, "pair feature"]:
        plain, size = super().normalised(features), len(self.gradients)
        if not self.whitens:
            return plain
        values, vectors = torch.linalg.eigh(self.gradients / (self.count - size - 1))
        inverse = values.clamp(min=LEAST_VARIANCE * float(values[-1])).rsqrt()
        white = (features - self.mean)[:, -size:] @ (vectors * inverse) @ vectors.T
        return torch.cat([plain[:, :-size], white], 1)


class Pairs(NamedTuple):
    """A linear map's inputs where an answer's token is predicted, and the gradients at its outputs; on the CPU."""

    keys: Float[Tensor, "pair d_in"]
    gradients: Float[Tensor, "pair d_out"]

    def falls(self, update: Update) -> Float[Tensor, " pair"]:
        """-g · ΔW h of each pair: how far an update takes the loss down, to first order."""
        keys, gradients = self.keys.double(), self.gradients.double()
        if isinstance(update, LowRank):
            return -((keys @ update.right.T) * (gradients @ update.left)).sum(1)
        return -((keys @ update.dense().T) * gradients).sum(1)

    @property
    def features(self) -> Float[Tensor, "pair feature"]:
        return torch.cat(self, 1).double()


@dataclass(frozen=True)
class UltraEdit(WithoutSearch):
    """UltraEdit as a plan.

    `maps`: the linear maps that are written; none: `GATED` where the model has both, else down_proj.
    `shared`: modules of one shape have one normaliser between them, as in the authors' code, rather than one each.
    `tokens`: the most (padded) tokens of one forward and backward; it bounds memory, and moves the result
    by rounding only. `ridge`: a number, or `auto` for `closed_form.auto_ridge`'s of the h at hand. `lr`: likewise.
    `whiten`: gradients are normalised by `Whitening` (StableEdit). `warmup`: a facts file whose pairs the statistics
    begin with, before a session's first edit.
    """

    layers: tuple[int, ...]
    maps: tuple[str, ...] = ()
    lr: float | Literal["auto"] = 1e-6
    ridge: float | Literal["auto"] = 1.0
    shared: bool = False
    tokens: int = 2048
    whiten: bool = False
    warmup: str | None = None

    def sites(self, model: TracedModel) -> list[Site]:
        def maps(layer: int) -> Sequence[str]:
            return self.maps or (GATED if set(GATED) <= set(model.layout.at(layer).linears) else ("mlp",))

        return [Site(name, layer) for layer in sorted(set(self.layers)) for name in sorted(set(maps(layer)))]

    def describe(self) -> PlanText:
        solver = f"V Hᵀ(HHᵀ + ridge·I)⁻¹, V the {'whitened' if self.whiten else 'normalised'} gradient"
        maps = ", ".join(self.maps or GATED)
        return PlanText("no search: one backward pass", maps, solver, "all at once")

    def names(self, model: TracedModel) -> list[str]:
        return [model.weight_name(site) for site in self.sites(model)]

    def require_room(self, model: TracedModel) -> None:
        """No check yet: memory grows with the answers' tokens, and `solve` checks it after counting them."""

    def solve(self, context: SolveContext, facts: Sequence[Fact], progress: Progress | None = None) -> SolveResult:
        model, sites = context.model, self.sites(context.model)
        answers = [wanted_ids(model.reader, fact) for fact in facts]
        self._require_memory(model, sum(map(len, answers)))
        if len(facts) == 1 and not context.state.running:
            warn_user(
                "UltraEdit takes away what the pairs of a session have in common, and one request alone has little "
                "else: its target may not rise; edit several requests at once, or use another method"
            )
        pairs, losses = answer_pairs(model, facts, answers, sites, self.tokens, progress)
        groups = {site: self._group(model, site) for site in sites}
        running = dict(context.state.running)
        if self.warmup is not None and not running:
            self._see(self._warm(model, sites), groups, running)
        self._see(pairs, groups, running)
        waiting = [each for each in running.values() if isinstance(each, Whitening) and not each.whitens]
        if waiting:
            warn_user(
                f"the session has seen {waiting[0].count} pairs (an answer's token at a weight); StableEdit whitens "
                f"from {len(waiting[0].gradients) + 2} on, and is UltraEdit before: give warmup, a file of facts"
            )
        written = {}
        for site, group in groups.items():
            name = model.weight_name(site)
            shifts = value_shifts(pairs[site], running[group], 1.0 if self.lr == "auto" else self.lr)
            keys, ridge, chosen = pairs[site].keys.double(), self.ridge, None
            if ridge == "auto":
                chosen = auto_ridge(Spectrum.of_keys(keys.T), WANTED, 1.0)
                ridge = chosen.ridge
            update, condition = ridge_fit(keys, shifts, ridge, RAISE)
            if not update.finite:
                raise WorkFailed(f"the update of {name} is not finite; lower lr or raise L2")
            about = chosen and chosen.as_dict()
            written[name] = WeightUpdate(update, condition, residual_norm=float(shifts.norm()), chosen=about)
        if self.lr == "auto":
            falls = torch.stack([pairs[site].falls(written[model.weight_name(site)].update) for site in sites])
            rate = measured_rate(model, facts, written, automatic_rate(losses, falls.sum(0)))
            written = {name: _at_rate(each, rate) for name, each in written.items()}
        context.state.running.update(running)  # last of all: an edit that failed has not been seen
        return SolveResult(written)

    def update_history(self, context: SolveContext, facts: Sequence[Fact]) -> None:
        """No work: `solve` adds its pairs to the running statistics itself."""

    def _see(self, pairs: Mapping[Site, Pairs], groups: Mapping[Site, str], running: dict[str, Running]) -> None:
        """Merge pairs into the running statistics."""
        for site, group in groups.items():
            seen: Running = Whitening.of_pairs(pairs[site]) if self.whiten else Running.of(pairs[site].features)
            running[group] = running[group].merged(seen) if group in running else seen

    def _warm(self, model: TracedModel, sites: Sequence[Site]) -> dict[Site, Pairs]:
        """The pairs of the warm-up's facts, by their targets, or their answers where they have none."""
        facts = load_facts(self.warmup or "")
        texts = [(fact, fact.target or fact.answer or "") for fact in facts]
        answers = [target_ids(model.reader, fact.prompt, text, fact.target_prefix) for fact, text in texts]
        self._require_memory(model, sum(map(len, answers)))
        return answer_pairs(model, facts, answers, sites, self.tokens)[0]

    def _require_memory(self, model: TracedModel, count: int) -> None:
        """For every site's pairs and, of one site at a time, four float64 copies of them and three of its system."""
        sites = self.sites(model)
        widths = [sum(model.weight(site).shape) for site in sites]
        system = max(min(count, model.key_size(site)) for site in sites)
        needed = count * sum(widths) * model.dtype.itemsize + 8 * (4 * count * max(widths) + 3 * system**2)
        if self.whiten:
            needed += 8 * sum(3 * model.weight(site).shape[0] ** 2 for site in sites[: 1 if self.shared else None])
        advice = "edit fewer requests at a time, or fewer layers"
        require_memory(needed, f"an edit of {count:,} answer tokens at {len(widths)} weights", advice)

    def _group(self, model: TracedModel, site: Site) -> str:
        """Whose pairs are normalised together."""
        if not self.shared:
            return model.weight_name(site)
        return "{}x{}".format(*model.weight(site).shape)


def answer_pairs(
    model: TracedModel,
    facts: Sequence[Fact],
    answers: Sequence[Sequence[int]],
    sites: Sequence[Site],
    tokens: int,
    progress: Progress | None = None,
    prompts: bool = False,
) -> tuple[dict[Site, Pairs], Float[Tensor, " token"]]:
    """Keys and gradients at every site, one pair an answer token: facts in their order, tokens in theirs; and -log p of
    those tokens. With `prompts`, also a pair for every token before."""
    tokenizer = model.reader
    ids = tuple((*token_ids(tokenizer, f.prompt), *answer[:-1]) for f, answer in zip(facts, answers, strict=True))
    parts: list[dict[Site, Pairs]] = []
    done: list[int] = []
    losses: list[Tensor] = []
    for numbers, batch, _ in Rows(ids, tuple(len(row) - 1 for row in ids)).batches(pad_id(tokenizer), tokens):
        part, loss = _forward_and_back(model, batch, [answers[i] for i in numbers], sites, prompts)
        parts.append(part)
        losses.append(loss)
        done += numbers
        if progress:
            progress(len(done), len(facts))
    order = _order(done, answers)
    pair_order = _order(done, ids) if prompts else order
    pairs_at = {
        s: Pairs(*(torch.cat(each)[pair_order] for each in zip(*(p[s] for p in parts), strict=True))) for s in sites
    }
    for site, pairs in pairs_at.items():
        if not all(bool(torch.isfinite(each).all()) for each in pairs):
            raise WorkFailed(f"keys or gradients at {site} are not finite; load the model in bfloat16 or float32")
    return pairs_at, torch.cat(losses)[order]


def _order(done: Sequence[int], rows: Sequence[Sequence[int]]) -> Int[Tensor, " token"]:
    """What brings the tokens of rows that were read in the order `done` back into the rows' own."""
    return torch.tensor([number for number in done for _ in rows[number]]).argsort(stable=True)


def _forward_and_back(
    model: TracedModel, batch: Batch, answers: Sequence[Sequence[int]], sites: Sequence[Site], prompts: bool
) -> tuple[dict[Site, Pairs], Float[Tensor, " token"]]:
    """Keys, and gradients of the answers' summed -log p, where the answers' tokens are predicted (with `prompts`, at
    every token); -log p of each answer's token."""
    width, keep = batch.ids.shape[1], max(map(len, answers))
    # Rows are padded on the left and end before their answer's last token, so the last columns predict the answers.
    places = [(row, keep - len(a) + i, token) for row, a in enumerate(answers) for i, token in enumerate(a)]
    row, column, token = torch.tensor(places).T

    losses: list[Tensor] = []

    def loss(logits: Float[Tensor, "row keep vocab"]) -> Float[Tensor, ""]:
        losses.append(-logits.log_softmax(-1)[row, column, token])
        return losses[0].sum()

    if prompts:
        row_of, column_of = batch.mask.nonzero().T
        at = row_of, column_of
    else:
        at = row, column + width - keep
    read = model.linear_io(batch, sites, loss, keep, at)
    return {site: Pairs(*both) for site, both in read.items()}, losses[0].detach().double().cpu()


def value_shifts(pairs: Pairs, running: Running, lr: float) -> Float[Tensor, "pair d_out"]:
    """v = -lr · ‖ĥ‖² · ĝ.

    Raises:
        WorkFailed: the session has seen a single pair, which is its own mean.
    """
    if running.count < 2:
        raise WorkFailed(
            "one answer token is all that this session has seen, and normalised by itself it is zero; "
            "edit several requests at once"
        )
    keys, gradients = running.normalised(pairs.features).split([p.shape[1] for p in pairs], 1)
    return einsum(-lr * keys.square().sum(1), gradients, "pair, pair d_out -> pair d_out")


def automatic_rate(losses: Float[Tensor, " pair"], falls: Float[Tensor, " pair"]) -> float:
    """The start of the module's automatic lr.

    Args:
        losses: -log p of the answers' tokens.
        falls: What the updates of lr = 1 take away of it, to first order.

    Raises:
        WorkFailed: they take nothing away.
    """
    if not float(falls.mean()) > 0:
        raise WorkFailed("to first order UltraEdit's update does not raise these answers; give lr a number")
    needed = torch.where(falls > 0, losses / falls, torch.inf)
    enough = needed.kthvalue(math.ceil(WANTED * len(needed))).values
    return min(float(enough), MOST * float(losses.mean() / falls.mean()))


def measured_rate(
    model: TracedModel, facts: Sequence[Fact], written: Mapping[str, WeightUpdate], start: float
) -> float:
    """The first rate from `start` on, √2 apart, with which every token of `WANTED` of the answers is the likeliest;
    else the best of `start` and those behind it before the first that takes perplexity above `MOST_HARM` times its own.

    Args:
        written: the updates of lr = 1.
    """
    found: list[tuple[float, float, float]] = []
    before = None
    for rate in (start * 2 ** (number / 2) for number in range(RATES)):
        before = read_text(model) if len(found) == 1 else before  # most edits need no second rate
        with model.restored(written):
            for name, each in written.items():
                model.write(name, each.update.scaled(rate))
            after = None if before is None else read_text(model)
            if before and after and not after.perplexity <= MOST_HARM * before.perplexity:
                break
            scores = target_scores(model, facts)
        said = sum(bool(score.is_greedy) for score in scores) / len(scores)
        likely = sum(score.log_prob or 0.0 for score in scores)
        found.append((said, -math.inf if math.isnan(likely) else likely, rate))
        if said >= WANTED:
            break
    return max(found)[2]


def _at_rate(written: WeightUpdate, rate: float) -> WeightUpdate:
    """What was solved at lr = 1."""
    return written._replace(
        update=written.update.scaled(rate),
        residual_norm=(written.residual_norm or 0.0) * rate,
        chosen=(written.chosen or {}) | {"lr": rate},
    )


class Fit(NamedTuple):
    """An update and the condition number (1-norm estimate) of the system that gave it."""

    update: Update
    condition: float


def ridge_fit(keys: Float[Tensor, "pair d_in"], shifts: Float[Tensor, "pair d_out"], ridge: float, remedy: str) -> Fit:
    """The ΔW that minimises Σ ‖ΔW h - v‖² + ridge · ‖ΔW‖², by whichever system is smaller.

    With H of one column a pair, V Hᵀ (H Hᵀ + ridge I)⁻¹ = V (Hᵀ H + ridge I)⁻¹ Hᵀ: one side has a row per input, the
    other one per pair, and with fewer pairs than inputs its two factors are kept apart.

    Args:
        remedy: what the user can do about a singular system; each method has its own setting for the ridge, or none.

    Raises:
        WorkFailed: the system is singular.
    """
    few = keys.shape[0] <= keys.shape[1]
    system = keys @ keys.T if few else keys.T @ keys
    system.diagonal().add_(ridge)
    factor, bad = torch.linalg.cholesky_ex(system)
    if int(bad):
        raise WorkFailed(f"H Hᵀ + {ridge:g} I (size {len(system)}) is singular; {remedy}")
    reciprocal, _ = lapack.dpocon(np.asfortranarray(factor.numpy()), float(system.abs().sum(0).max()), uplo="L")
    condition = 1 / float(reciprocal) if reciprocal else float("inf")
    if few:
        return Fit(LowRank(shifts.T.contiguous(), torch.cholesky_solve(keys, factor)), condition)
    return Fit(Dense(torch.cholesky_solve(keys.T @ shifts, factor).T.contiguous()), condition)
