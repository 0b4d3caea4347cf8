"""Addresses inside a model, and the updates that are written there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .packed import parts


@dataclass(frozen=True)
class LowRank:
    """An update left · right of a weight seen as (d_out, d_in)."""

    left: Float[Tensor, "d_out rank"]
    right: Float[Tensor, "rank d_in"]

    def __repr__(self) -> str:
        return f"LowRank(shape ({self.left.shape[0]}, {self.right.shape[1]}), rank {self.left.shape[1]})"

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        return self.left @ self.right

    def scaled(self, factor: float | Float[Tensor, " rank"]) -> LowRank:
        """Times a number, or each of the rank-one parts times its own."""
        return LowRank(self.left * factor, self.right)

    def plus(self, other: Update) -> Update:
        if isinstance(other, Dense):
            return other.plus(self)
        return LowRank(torch.cat([self.left, other.left], 1), torch.cat([self.right, other.right], 0)).smaller()

    def smaller(self) -> Update:
        """Dense where the factors hold as many numbers as their product, or more."""
        rows, columns = self.shape
        return self if self.rank * (rows + columns) < rows * columns else Dense(self.dense())

    def to(self, dtype: torch.dtype) -> LowRank:
        return LowRank(self.left.to("cpu", dtype).contiguous(), self.right.to("cpu", dtype).contiguous())

    @property
    def shape(self) -> tuple[int, ...]:
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    @property
    def finite(self) -> bool:
        return bool(torch.isfinite(self.left).all() and torch.isfinite(self.right).all())

    def norm(self) -> float:
        """Frobenius norm, from the two small Gram matrices."""
        gram = (self.left.T.double() @ self.left.double()) * (self.right.double() @ self.right.T.double())
        return float(gram.sum().clamp(min=0).sqrt())


@dataclass(frozen=True)
class Dense:
    """An update as it is: of a weight seen as (d_out, d_in), or of a bias or a norm's gain."""

    matrix: Float[Tensor, "*shape"]

    def __repr__(self) -> str:
        return f"Dense(shape {tuple(self.matrix.shape)})"

    def dense(self) -> Float[Tensor, "*shape"]:
        return self.matrix

    def scaled(self, factor: float) -> Dense:
        return Dense(self.matrix * factor)

    def plus(self, other: Update) -> Dense:
        return Dense(self.matrix + other.dense().to(self.matrix.dtype))

    def to(self, dtype: torch.dtype) -> Dense:
        return Dense(self.matrix.to("cpu", dtype).contiguous())

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.matrix.shape)

    @property
    def rank(self) -> int:
        """The largest that it can be: nothing is known of a dense update's own."""
        return min(self.matrix.shape)

    @property
    def finite(self) -> bool:
        return bool(torch.isfinite(self.matrix).all())

    def norm(self) -> float:
        return float(self.matrix.double().norm())


Update = LowRank | Dense


def fingerprint_of(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes: which weights these are."""
    return fingerprint_in_order(sorted(named, key=lambda pair: pair[0]))


def fingerprint_in_order(named: Iterable[tuple[str, Tensor]]) -> str:
    """The same of names that come sorted, for tensors that are not to be in memory together."""
    digest = hashlib.sha256()
    for name, tensor in named:
        for each in parts(tensor):
            digest.update(f"{name} {each.dtype} {tuple(each.shape)}".encode())
            digest.update(each.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
