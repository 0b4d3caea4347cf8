"""One weight's second moment, and what is computed from it once: its Cholesky factor, its null space.

Both cost O(d³) and belong to C alone, not to an edit: they are kept with it, for every batch and every method that asks
the same `Statistics` again, as long as they are small against the memory that is free.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import WorkFailed
from ..memory import free_memory, require_memory

RIDGES = (0.0, 1e-8, 1e-7, 1e-6)
"""Tried in turn, times the largest diagonal entry. C is stored in float32, so its null space is only known to about
1e-7 of its size; keys that no corpus token ever excites (GPT-J's layer 0 sees one key a token) live there."""

FACTOR_COPIES, PROJECTOR_COPIES = 3, 6
"""Float64 matrices of C's size alive at the peak: C, a ridged copy and the factor; C, its eigenvectors, LAPACK's
workspace of two more, the kept ones and what is stored."""


class Factored(NamedTuple):
    """The lower Cholesky factor of a matrix plus the least ridge that makes it positive definite."""

    factor: Float[Tensor, "d d"]
    ridge: float


class Moment:
    """C of the weight called `name`, (size, size); `read` brings the matrix from where it is kept."""

    def __init__(self, name: str, size: int, read: Callable[[], Tensor]) -> None:
        self.name, self.size = name, size
        self._read = read
        self._factor: Factored | None = None
        self._null: dict[float, Tensor] = {}
        self._sha256: str | None = None

    @classmethod
    def of(cls, matrix: Float[Tensor, "d d"], name: str = "C") -> Moment:
        return cls(name, len(matrix), lambda: matrix)

    def matrix(self) -> Float[Tensor, "d d"]:
        """C, float64 on the CPU."""
        matrix = self._read().to("cpu", torch.float64)
        if not bool(torch.isfinite(matrix).all()):
            raise WorkFailed(f"the second moment of {self.name} is not finite; take the statistics again")
        return matrix

    def sha256(self) -> str:
        """Of the matrix's bytes as it is stored, row by row; read once."""
        if self._sha256 is None:
            stored = self._read().detach().cpu().contiguous()
            self._sha256 = hashlib.sha256(stored.view(-1).view(torch.uint8).numpy().data).hexdigest()
        return self._sha256

    def factor(self) -> Factored:
        """C = L Lᵀ, up to its ridge."""
        if self._factor is not None:
            return self._factor
        factored = cholesky(self.matrix(), f"the second moment of {self.name}")
        if self._worth_keeping(factored.factor):
            self._factor = factored
        return factored

    def null_basis(self, threshold: float) -> Float[Tensor, "d null"]:
        """The eigenvectors of C whose eigenvalue lies below the threshold (AlphaEdit's U₀).

        Raises:
            WorkFailed: there are none, so that nothing could be written.
        """
        if threshold in self._null:
            return self._null[threshold]
        values, vectors = torch.linalg.eigh(self.matrix())
        kept = vectors[:, values.abs() < threshold].contiguous()
        if not kept.shape[1]:
            raise WorkFailed(
                f"no direction of the second moment of {self.name} lies below nullspace_threshold {threshold:g} "
                f"(smallest {float(values.abs().min()):.2g}); raise it"
            )
        if self._worth_keeping(kept):
            self._null[threshold] = kept
        return kept

    @staticmethod
    def _worth_keeping(result: Tensor) -> bool:
        return 4 * result.numel() * result.element_size() < free_memory()


def cholesky(matrix: Float[Tensor, "d d"], what: str) -> Factored:
    """The factor of the matrix with the least ridge that makes it positive definite.

    Raises:
        WorkFailed: none does.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise WorkFailed(f"{what} is not finite; check the model's weights and statistics")
    largest = float(matrix.diagonal().max())
    for ridge in RIDGES:
        ridged = matrix + ridge * largest * torch.eye(len(matrix), dtype=matrix.dtype) if ridge else matrix
        factor, bad = torch.linalg.cholesky_ex(ridged)
        if not int(bad) and largest > 0:
            return Factored(factor, ridge)
    raise WorkFailed(
        f"{what} (size {len(matrix)}) is singular: take the second moment over more tokens, or raise mom2_update_weight"
    )


def require_room(what: str, size: int, copies: int) -> None:
    """Refuse, with the figure, what would not fit; asked before any work is done."""
    require_memory(
        copies * 8 * size * size,
        f"{what} (d_key {size:,}, {copies} float64 matrices at the peak)",
        "edit fewer or smaller weights, free memory, or take a machine with more",
    )
