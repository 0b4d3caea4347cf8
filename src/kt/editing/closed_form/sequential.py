"""Closed forms of methods that edit one model many times: each is `LeastSquares` or `NullSpace` with one thing more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import KtError, NothingToWrite
from ...model.update import Dense, LowRank, Update
from .auto_ridge import LEAST, single_key_ridge
from .factor import Moment
from .solvers import LeastSquares, NullSpace, RegularisedGram, Solution, System, given, joined

NO_COST = 1e-5
"""‖ΔW‖/‖W‖, weighed by C, of an edit that changed nothing but rounding: LyapLock's budget is not counted in it."""
BETA_LEAK = 3000.0
"""BetaEdit's λ₁ in the mixture of which it takes P again, where λ₁ is automatic."""


@dataclass(frozen=True)
class NormConstrained(LeastSquares):
    """R Kᵀ (λC + λₙI + H + K Kᵀ)⁻¹ (ENCORE): the norm of ΔW has a price of its own.

    An automatic λₙ is λ times the mean of C's eigenvalues, and an automatic λ then follows the keys as C + λₙ/λ · I
    sees them.
    """

    formula: ClassVar[str] = "R Kᵀ(λC + λₙI + H + KKᵀ)⁻¹"

    ridge: float | Literal["auto"] = "auto"

    def __call__(self, system: System) -> Solution:
        moment = given(system.moment)
        if self.ridge == "auto":
            return super().__call__(system._replace(moment=moment.ridged(moment.mean())))
        weight, chosen = self.chosen_weight(system)
        if weight == 0:
            raise KtError("mom2_update_weight 0 leaves C out, which update_norm_lambda is added to; give it a number")
        ridged = moment.ridged(self.ridge / weight, store=chosen is None)  # an automatic λ is another one each time
        solution = self.solved(system._replace(moment=ridged), weight, chosen)
        if chosen is None:
            return solution
        assert isinstance(solution.update, LowRank)
        through = (solution.update.right * system.keys.T).sum(1)  # λ was chosen without λₙ, which lets less through
        return solution._replace(chosen=chosen._replace(share=float(through.median())))


@dataclass(frozen=True)
class Restoring(LeastSquares):
    """LyapLock: (R Kᵀ + R_p K_pᵀ + qλ(W₀ - W)C) (qλC + H + K Kᵀ)⁻¹, H = K_p K_pᵀ.

    The update also brings the past keys' values back to what they were given (R_p), and the outputs on C's text back to
    the unedited ones. q is a Lyapunov queue in units of its floor. With D = tr((W - W₀) C (W - W₀)ᵀ) after an edit, and
    D₀ the first edit's,

        q ← max(1, q + D / (α D₀) - 1)

    so C weighs more as long as D is above α times what one edit costs. LyapLock's own Z and a are √(αD₀) q and
    1 / √(αD₀): only their product enters. Its V₀K₀ᵀ is W₀C.
    """

    formula: ClassVar[str] = "(R Kᵀ + R_pK_pᵀ + qλ(W₀ - W)C)(qλC + H + KKᵀ)⁻¹"
    restores: ClassVar[bool] = True

    budget: float = 60.0

    def __post_init__(self) -> None:
        if not self.budget > 0:
            raise KtError(f"cost_budget {self.budget:g} must be above zero: it is what edits may cost, in first edits")

    def remembered(
        self, before: Mapping[str, float] | None, change: Update | None, moment: Moment, weight: Tensor
    ) -> dict[str, float]:
        """D₀ and q, from those before the last edit and all that the edits so far changed.

        D₀ is the cost of the first edit that changed anything: one whose requests were all left alone has none.
        """
        before = dict(before or {"queue": 1.0})
        if change is None:
            return {"queue": 1.0}
        cost = float((_times(change, moment.matrix()).dense() * change.dense()).sum())
        if not before.get("first") and cost <= NO_COST**2 * moment.mean() * float(weight.double().square().sum()):
            return before
        first = before.get("first") or cost
        return {"first": first, "queue": max(1.0, before["queue"] + cost / (self.budget * first) - 1)}

    def __call__(self, system: System) -> Solution:
        weight, chosen = self.chosen_weight(system)
        weight, moment = weight * system.queue, given(system.moment)
        keys = joined(system.keys, system.past)
        held = RegularisedGram(moment, weight, keys)
        wanted = joined(system.residuals, system.past_residuals)
        update: Update = LowRank(wanted, held.solve_own(keys.shape[1]).T.contiguous())
        if system.change is not None:
            drift = _times(system.change, moment.matrix())
            if isinstance(drift, LowRank):
                back: Update = replace(drift, right=held.solve(drift.right.T).T.contiguous())
            else:
                back = Dense(held.solve(drift.matrix.T).T.contiguous())
            update = update.plus(back.scaled(-weight))
        return Solution(update, held.condition(), held.ridge, chosen)


@dataclass(frozen=True)
class ActiveNeurons(LeastSquares):
    """NSE: the same solve among the neurons that the facts excite most, the others' columns of W left alone.

    Neurons are taken by Σ|k| over the facts, the largest first, as long as they make at most `neurons` of the sum.
    """

    formula: ClassVar[str] = "R K_Sᵀ(λC_SS + H_SS + K_S K_Sᵀ)⁻¹, S the most active neurons"

    neurons: float = 0.8

    def __call__(self, system: System) -> Solution:
        if self.neurons >= 1:
            return super().__call__(system)
        scores = system.keys.abs().sum(1)
        order = scores.argsort(descending=True, stable=True)
        count = int((scores[order].cumsum(0) <= self.neurons * scores.sum()).sum())
        chosen = order[: max(1, count)].sort().values
        part = system._replace(
            keys=system.keys[chosen],
            moment=Moment.of(given(system.moment).matrix()[chosen][:, chosen]),
            past=None if system.past is None else system.past[chosen],
        )
        solution = super().__call__(part)
        assert isinstance(solution.update, LowRank)
        right = torch.zeros_like(system.keys.T).index_copy(1, chosen, solution.update.right)
        return solution._replace(update=LowRank(solution.update.left, right))


@dataclass(frozen=True)
class Leaky(NullSpace):
    """BetaEdit: R Kᵀ P (P(K Kᵀ + H + λ₁C)P + λ₂I)⁻¹: what of C leaks into P's range is held there, too.

    After every `refresh` past keys, P is taken again, of (H/n + λ₁C) / (λ₁ + 1). An automatic λ₂ is λ₁ times the mean
    of C's eigenvalues in the range.
    """

    formula: ClassVar[str] = "R KᵀP(P(KKᵀ + H + λ₁C)P + λ₂I)⁻¹"

    leak: float | Literal["auto"] = "auto"
    refresh: int = 1000

    @property
    def automatic(self) -> bool:
        return self.leak == "auto"

    def range_of(self, moment: Moment, past: Float[Tensor, "d_in past"] | None) -> tuple[Tensor, Moment]:
        """A basis of P's range, and C inside it."""
        count = 0 if past is None else past.shape[1] // self.refresh * self.refresh
        which: tuple[Any, ...] = (self.threshold, self.leak, count)
        source = moment
        if past is not None and count:
            mix = BETA_LEAK if self.leak == "auto" else self.leak
            sum_of = past[:, :count] @ past[:, :count].T
            which += (float(sum_of.diagonal().sum()),)
            source = Moment.of((sum_of / count + mix * moment.matrix()) / (mix + 1), moment.name)
        if which not in moment.within:
            basis = source.null_basis(self.threshold)
            moment.within = {which: (basis, Moment.of(basis.T @ moment.matrix() @ basis, moment.name))}
        return moment.within[which]

    def __call__(self, system: System) -> Solution:
        basis, inside = self.range_of(given(system.moment), system.past)
        past = None if system.past is None else basis.T @ system.past
        part = system._replace(keys=basis.T @ system.keys, moment=inside, past=past)
        solution = NormConstrained(self.leak, ridge=self.l2)(part)
        assert isinstance(solution.update, LowRank)
        update = LowRank(solution.update.left, (solution.update.right @ basis.T).contiguous())
        return solution._replace(update=update)


@dataclass(frozen=True)
class Evolving(NullSpace):
    """EvoEdit: R Kᵀ P (K KᵀP + L2 · I)⁻¹, and after each edit P ← P - Q Qᵀ, Q an orthonormal basis of P K.

    All edits together: P's range without the span of the past keys, none of whose values can change any more.
    """

    formula: ClassVar[str] = "R KᵀP(KKᵀP + L2·I)⁻¹, P less the span of earlier keys"

    def __call__(self, system: System) -> Solution:
        basis = given(system.moment).null_basis(self.threshold)
        inside = basis.T @ system.keys
        if system.past is None:
            return self.solved(system, basis, inside)
        past = basis.T @ system.past
        vectors, values, _ = torch.linalg.svd(past, full_matrices=False)
        span = vectors[:, values > max(past.shape) * torch.finfo(values.dtype).eps * values[0]]
        if span.shape[1] == len(past):
            raise NothingToWrite(
                f"earlier edits' keys span all {len(past)} directions that {given(system.moment).name} has free: "
                "EvoEdit has none left to write in; begin a new session, or use another method"
            )
        free = inside - span @ (span.T @ inside)
        held = free.norm(dim=0) <= system.rounding * inside.norm(dim=0)
        which = tuple(held.nonzero()[:, 0].tolist())
        if len(which) == len(held):
            raise NothingToWrite(
                f"{holds(system, which, given(system.moment).name)}; leave out what is about that subject, or use "
                "alphaedit"
            )
        # What is free of a key can be short beside the key, and an L2 that followed it would let the update grow
        # without bound: an automatic one is at least the least ridge of the whole keys.
        whole = float(inside[:, ~held].square().sum(0).median())
        part = system._replace(keys=system.keys[:, ~held], residuals=system.residuals[:, ~held])
        least = LEAST * single_key_ridge(whole, system.share)
        solution = self.solved(part, basis, free[:, ~held], least)
        assert isinstance(solution.update, LowRank)
        right = torch.zeros_like(system.keys.T)
        right[~held] = solution.update.right  # of a held request nothing is written
        return solution._replace(update=LowRank(system.residuals, right), held=which)


def holds(system: System, which: Sequence[int], name: str) -> str:
    """That earlier edits hold these requests' keys whole at a weight: what EvoEdit leaves of them is rounding, and no
    update moves it."""
    first = repr(system.requests[which[0]]) if system.requests else f"request {which[0] + 1}"
    others = f" (and {len(which) - 1} more)" if len(which) > 1 else ""
    return f"an earlier edit already holds the key of {first}{others} at {name}, which evoedit never changes again"


def _times(change: Update, matrix: Float[Tensor, "d_in d_in"]) -> Update:
    """A change of a weight times a matrix, in float64."""
    change = change.to(torch.float64)
    return LowRank(change.left, change.right @ matrix) if isinstance(change, LowRank) else Dense(change.matrix @ matrix)
