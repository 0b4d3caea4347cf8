"""An update as the two factors of a LoRA adapter: ΔW ≈ B A, B (d_out, rank), A (rank, d_in) (Hu et al. 2021, 4.1).

Low-rank updates come with their factors. Of a dense update, and where fewer columns are wanted, the factors are the
largest singular triplets, which no others of that rank come nearer to (Eckart and Young 1936). Those of a product
L R follow from two thin QR decompositions, L = Q1 S1 and Rᵀ = Q2 S2: the rest is the SVD of the small S1 S2ᵀ.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..sites import Dense, LowRank, Update


class Factors(NamedTuple):
    """`needed` is the rank that would be exact; `error` is ‖BA - ΔW‖ with the factors as rounded, `norm` ‖ΔW‖."""

    b: Float[Tensor, "d_out rank"]
    a: Float[Tensor, "rank d_in"]
    needed: int
    error: float
    norm: float


class Triplets(NamedTuple):
    """Singular vectors and values, float64, without those below the noise of float32."""

    left: Float[Tensor, "d_out rank"]
    values: Float[Tensor, " rank"]
    right: Float[Tensor, "rank d_in"]


def factors(update: Update, max_rank: int | None = None, dtype: torch.dtype = torch.float32) -> Factors:
    """B and A of an update of a linear map's weight, of no more columns than needed and than `max_rank`.

    A low-rank update whose columns are all needed keeps its own factors, which is exact in float32.
    """
    found = triplets(update)
    needed = len(found.values)
    rank = needed if max_rank is None else min(needed, max_rank)
    if isinstance(update, LowRank) and rank == update.rank:
        b, a = update.left, update.right
    else:
        # The root of each value on either side, so that neither factor is the one that suffers from a short dtype.
        root = found.values[:rank].sqrt()
        b, a = found.left[:, :rank] * root, root[:, None] * found.right[:rank]
    b, a = b.to("cpu", dtype).contiguous(), a.to("cpu", dtype).contiguous()
    return Factors(b, a, needed, _distance(b, a, update), update.norm())


def triplets(update: Update) -> Triplets:
    """The update's singular value decomposition, cut at its numerical rank in float32."""
    if isinstance(update, Dense):
        left, values, right = torch.linalg.svd(update.matrix.double(), full_matrices=False)
    else:
        left, small_left = torch.linalg.qr(update.left.double())
        right, small_right = torch.linalg.qr(update.right.double().T)
        inner_left, values, inner_right = torch.linalg.svd(small_left @ small_right.T, full_matrices=False)
        left, right = left @ inner_left, inner_right @ right.T
    noise = max(update.shape) * torch.finfo(torch.float32).eps
    kept = int((values > values[:1] * noise).sum())
    return Triplets(left[:, :kept], values[:kept], right[:kept])


def _distance(b: Float[Tensor, "d_out rank"], a: Float[Tensor, "rank d_in"], update: Update) -> float:
    """‖BA - ΔW‖, of a low-rank ΔW without making it dense."""
    b, a = b.double(), a.double()
    if isinstance(update, Dense):
        return float((b @ a - update.matrix.double()).norm())
    if b.shape == update.left.shape and torch.equal(b, update.left.double()) and torch.equal(a, update.right.double()):
        return 0.0
    return LowRank(torch.cat([b, -update.left.double()], 1), torch.cat([a, update.right.double()], 0)).norm()
