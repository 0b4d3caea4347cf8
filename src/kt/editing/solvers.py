"""Closed forms: from keys, residuals and a second moment to a low-rank update.

A solver is a small value with one method. Everything is float64 and Cholesky (LU for AlphaEdit's unsymmetric system);
no matrix is inverted explicitly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import lapack
from torch import Tensor

from ..errors import WorkFailed
from ..sites import LowRank

RIDGES = (0.0, 1e-8, 1e-7, 1e-6)
"""Tried in turn, times the largest diagonal entry. C is stored in float32, so its null space is only known to about
1e-7 of its size; keys that no corpus token ever excites (GPT-J's layer 0 sees one key a token) live there."""


class Solution(NamedTuple):
    """An update, the condition number (1-norm estimate) of the system that gave it, and the ridge it needed."""

    update: LowRank
    condition: float
    ridge: float = 0.0


class System(NamedTuple):
    """What a solver is given: all float64 on the CPU.

    `keys` are means over contexts, `bare` those of the bare prompts; `history` is the sum of k kᵀ over the keys that
    earlier edits of the session wrote, or None.
    """

    residuals: Float[Tensor, "d_out fact"]
    keys: Float[Tensor, "d_in fact"]
    bare: Float[Tensor, "d_in fact"] | None
    moment: Float[Tensor, "d_in d_in"] | None
    history: Float[Tensor, "d_in d_in"] | None


class Solver(Protocol):
    """From a system to an update. `needs_moment` and `needs_bare` say what must be filled in."""

    @property
    def needs_moment(self) -> bool: ...

    @property
    def needs_bare(self) -> bool: ...

    def __call__(self, system: System) -> Solution: ...


@dataclass(frozen=True)
class LeastSquares:
    """R Kᵀ (λC + K Kᵀ)⁻¹ (IntAttn-Edit eq. 6; MEMIT eq. 14, with K0 K0ᵀ = λC)."""

    weight: float = 15000.0
    needs_moment: bool = True
    needs_bare: bool = False

    def __call__(self, system: System) -> Solution:
        moment = self.weight * _given(system.moment)
        if system.history is not None:
            moment = moment + system.history
        return least_squares(system.residuals, system.keys, moment)


@dataclass(frozen=True)
class NullSpace:
    """R Kᵀ P ((K Kᵀ + H) P + L2 · I)⁻¹ (AlphaEdit), P the projector onto directions of C below `threshold`.

    The threshold is absolute, as in the original code: it depends on the scale of the keys.
    """

    threshold: float = 2e-2
    l2: float = 10.0
    needs_moment: bool = True
    needs_bare: bool = False

    def __call__(self, system: System) -> Solution:
        projector = null_space(_given(system.moment), self.threshold)
        gram = system.keys @ system.keys.T
        if system.history is not None:
            gram = gram + system.history
        matrix = projector @ gram + self.l2 * torch.eye(len(gram), dtype=gram.dtype)
        spread = torch.linalg.solve(matrix, projector @ system.keys)
        norm = float(matrix.abs().sum(0).max()) / self.l2  # the smallest eigenvalue is L2
        return Solution(LowRank(system.residuals, spread.T.contiguous()), norm)


@dataclass(frozen=True)
class RankOne:
    """r uᵀ / (uᵀ k), u = C⁻¹ k̄ (ROME eq. 2). ROME's code takes k of the bare prompt and k̄ over contexts;
    R-ROME takes k̄ in both places. Without `mom2_adjustment`, C = I (all of EasyEdit's ROME files)."""

    mom2_adjustment: bool = True
    same_key: bool = False

    @property
    def needs_moment(self) -> bool:
        return self.mom2_adjustment

    @property
    def needs_bare(self) -> bool:
        return not self.same_key

    def __call__(self, system: System) -> Solution:
        direction, condition, ridge = system.keys, 1.0, 0.0
        if self.mom2_adjustment:
            factor, whole, ridge = cholesky(_given(system.moment))
            direction, condition = torch.cholesky_solve(system.keys, factor), _condition(whole, factor)
        direction = direction / direction.norm(dim=0)
        met = system.keys if self.same_key else _given(system.bare)
        left = system.residuals / (direction * met).sum(0)
        return Solution(LowRank(left, direction.T.contiguous()), condition, ridge)


def least_squares(
    residuals: Float[Tensor, "d_out fact"], keys: Float[Tensor, "d_in fact"], held: Float[Tensor, "d_in d_in"]
) -> Solution:
    """R Kᵀ (H + K Kᵀ)⁻¹, where H says how much each direction of key space is to be held.

    Raises:
        WorkFailed: the system is singular or not finite.
    """
    factor, whole, ridge = cholesky(held + keys @ keys.T)
    spread = torch.cholesky_solve(keys, factor)
    return Solution(LowRank(residuals, spread.T.contiguous()), _condition(whole, factor), ridge)


class Factored(NamedTuple):
    factor: Float[Tensor, "d d"]
    system: Float[Tensor, "d d"]
    ridge: float


def cholesky(system: Float[Tensor, "d d"]) -> Factored:
    """The lower factor, of the system with the least ridge that makes it positive definite."""
    if not bool(torch.isfinite(system).all()):
        raise WorkFailed("the keys or their second moment are not finite; check the model's weights and statistics")
    system = system.clone()
    largest = float(system.diagonal().max())
    for ridge in RIDGES:
        system.diagonal().add_(ridge * largest)
        factor, bad = torch.linalg.cholesky_ex(system)
        if not int(bad) and largest > 0:
            return Factored(factor, system, ridge)
    raise WorkFailed(
        f"λC + KKᵀ (size {len(system)}) is singular: take the second moment over more tokens, "
        "or raise mom2_update_weight"
    )


def null_space(moment: Float[Tensor, "d d"], threshold: float) -> Float[Tensor, "d d"]:
    """U₀ U₀ᵀ over the eigenvectors of C with eigenvalue below the threshold.

    Raises:
        WorkFailed: there are none, so that nothing could be written.
    """
    values, vectors = torch.linalg.eigh(moment)
    kept = vectors[:, values.abs() < threshold]
    if not kept.shape[1]:
        raise WorkFailed(
            f"no direction of the second moment lies below nullspace_threshold {threshold:g} "
            f"(smallest {float(values.abs().min()):.2g}); raise it"
        )
    return kept @ kept.T


def _given(value: Tensor | None) -> Tensor:
    assert value is not None, "the recipe fills in what a solver needs"
    return value


def _condition(system: Float[Tensor, "d d"], factor: Float[Tensor, "d d"]) -> float:
    norm = float(system.abs().sum(0).max())
    reciprocal, _ = lapack.dpocon(np.asfortranarray(factor.numpy()), norm, uplo="L")
    return float("inf") if reciprocal == 0 else 1.0 / float(reciprocal)
