"""One weight's second moment, and what is computed from it once: its Cholesky factor, its null space.

Both cost O(d³) and belong to C alone, not to an edit: they are kept with it, for every batch and every method that asks
the same `Statistics` again, as long as they are small against the memory that is free, and (large ones) on disk, for
every later process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from ..artifacts import load_arrays
from ..errors import WorkFailed
from ..memory import free_memory, require_memory
from .kept import LEAST_SIZE, Store, agrees, discard, drawn, opened, times

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

    def solve(self, vectors: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
        """(L Lᵀ)⁻¹ of the vectors. `torch.cholesky_solve` copies the whole factor at each call: ten times the work for
        one vector."""
        inner = torch.linalg.solve_triangular(self.factor, vectors, upper=False)
        return torch.linalg.solve_triangular(self.factor.mT, inner, upper=True)


class Moment:
    """C of the weight called `name`, (size, size); `read` brings the matrix from where it is kept.

    With a `store`, the factor and the eigenvectors of a large C are also kept on disk.
    """

    def __init__(self, name: str, size: int, read: Callable[[], Tensor], store: Store | None = None) -> None:
        self.name, self.size = name, size
        self._read = read
        self._store = store if size >= LEAST_SIZE else None
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
        factored = self._kept_factor()
        if factored is None:
            factored = cholesky(self.matrix(), f"the second moment of {self.name}")
            if self._store is not None:
                # Column-major, as LAPACK gives and wants it: its transpose is written without a copy.
                path, arrays = self._store.path("factor", self.sha256()), {"transposed": factored.factor.mT}
                self._store.put(path, arrays, {"ridge": factored.ridge})
        if self._worth_keeping(factored.factor):
            self._factor = factored
        return factored

    def _kept_factor(self) -> Factored | None:
        if self._store is None or not opened(path := self._store.path("factor", self.sha256())):
            return None
        arrays, about = load_arrays(path, framework="pt")
        factor, ridge = arrays["transposed"].mT, float(about["ridge"])
        stored, vector = self._read().cpu(), drawn(self.size)
        largest = float(stored.diagonal().max())
        if agrees(factor @ (factor.mT @ vector), times(stored, vector) + ridge * largest * vector):
            return Factored(factor, ridge)
        discard(path)
        return None

    def null_basis(self, threshold: float) -> Float[Tensor, "d null"]:
        """The eigenvectors of C whose eigenvalue lies below the threshold (AlphaEdit's U₀).

        Raises:
            WorkFailed: there are none, so that nothing could be written.
        """
        if threshold in self._null:
            return self._null[threshold]
        kept = self._kept_basis(threshold)
        if kept is None:
            values, vectors = torch.linalg.eigh(self.matrix())
            if self._store is not None:
                arrays = {"values": values, "rows": vectors.mT}
                self._store.put(self._store.path("eigen", self.sha256()), arrays, {})
            kept = vectors[:, self._null_range(values, threshold)].contiguous()
        if self._worth_keeping(kept):
            self._null[threshold] = kept
        return kept

    def _kept_basis(self, threshold: float) -> Float[Tensor, "d null"] | None:
        """Only the eigenvectors that are wanted are read."""
        if self._store is None or not opened(path := self._store.path("eigen", self.sha256())):
            return None
        with safe_open(path, "pt") as file:
            values = file.get_tensor("values")
            here = self._null_range(values, threshold)
            rows = file.get_slice("rows")[here.start : here.stop]
        mixed = drawn(self.size)[here]
        if agrees(rows.mT @ (values[here] * mixed), times(self._read().cpu(), rows.mT @ mixed)):
            return rows.mT.contiguous()
        discard(path)
        return None

    def _null_range(self, values: Float[Tensor, " d"], threshold: float) -> slice:
        """Which eigenvalues, in their ascending order, lie below the threshold."""
        small = torch.nonzero(values.abs() < threshold)
        if not len(small):
            raise WorkFailed(
                f"no direction of the second moment of {self.name} lies below nullspace_threshold {threshold:g} "
                f"(smallest {float(values.abs().min()):.2g}); raise it"
            )
        return slice(int(small[0]), int(small[-1]) + 1)

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
        ridged = matrix.clone() if ridge else matrix
        if ridge:
            ridged.diagonal().add_(ridge * largest)
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
