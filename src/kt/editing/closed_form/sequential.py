"""Closed forms of methods that edit one model many times: each is `LeastSquares` or `NullSpace` with one thing more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...errors import KtError
from .solvers import LeastSquares, Solution, System, given


@dataclass(frozen=True)
class NormConstrained(LeastSquares):
    """R Kᵀ (λC + λₙI + H + K Kᵀ)⁻¹ (ENCORE): the norm of ΔW has a price of its own.

    An automatic λₙ is λ times the mean of C's eigenvalues, and an automatic λ then follows the keys as C + λₙ/λ · I sees
    them.
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
        return self.solved(system._replace(moment=moment.ridged(self.ridge / weight)), weight, chosen)
