"""Closed forms: from keys, residuals and a second moment to a low-rank update.

Everything is float64 and Cholesky; no matrix is inverted explicitly.
"""

from __future__ import annotations

from typing import NamedTuple

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


def least_squares(
    residuals: Float[Tensor, "d_out fact"],
    keys: Float[Tensor, "d_in fact"],
    moment: Float[Tensor, "d_in d_in"],
    weight: float,
) -> Solution:
    """Return R Kᵀ (λ C + K Kᵀ)⁻¹ (IntAttn-Edit eq. 6; MEMIT eq. 14, with K0 K0ᵀ = λ C).

    Args:
        residuals: what the value at each key should gain.
        keys: one column a fact.
        moment: C = E[k kᵀ], uncentred.
        weight: λ, `mom2_update_weight`: how many tokens' worth of old keys to hold on to.

    Raises:
        WorkFailed: the system is singular or not finite.
    """
    keys, residuals = keys.double().cpu(), residuals.double().cpu()
    system = weight * moment.double().cpu() + keys @ keys.T
    if not bool(torch.isfinite(system).all()):
        raise WorkFailed("the keys or their second moment are not finite; check the model's weights and statistics")
    largest = float(system.diagonal().max())
    for ridge in RIDGES:
        system.diagonal().add_(ridge * largest)
        factor, bad = torch.linalg.cholesky_ex(system)
        if not int(bad) and largest > 0:
            spread = torch.cholesky_solve(keys, factor)
            return Solution(LowRank(residuals, spread.T.contiguous()), _condition(system, factor), ridge)
    raise WorkFailed(
        f"λC + KKᵀ is singular (λ = {weight:g}, {keys.shape[1]} keys of size {keys.shape[0]}): "
        "take the second moment over more tokens, or raise mom2_update_weight"
    )


def _condition(system: Float[Tensor, "d d"], factor: Float[Tensor, "d d"]) -> float:
    norm = float(system.abs().sum(0).max())
    reciprocal, _ = lapack.dpocon(np.asfortranarray(factor.numpy()), norm, uplo="L")
    return float("inf") if reciprocal == 0 else 1.0 / float(reciprocal)
