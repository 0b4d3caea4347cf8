"""Addresses inside a model, and the low-rank updates that are written there."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import UnknownSite


class Kind(str, Enum):
    """What a site holds: the residual stream, or the output of one of a block's two modules."""

    RESID = "hidden"
    ATTN = "attn"
    MLP = "mlp"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, order=True)
class Site:
    """One module at one layer: a dict key, a JSON string (`mlp.5`), a command-line word."""

    kind: Kind
    layer: int

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}"

    @classmethod
    def parse(cls, text: str) -> Site:
        kind, _, layer = text.partition(".")
        try:
            return cls(Kind(kind), int(layer))
        except ValueError:
            raise UnknownSite(f"{text!r} is no site; write kind.layer, such as mlp.5 or attn.2") from None


@dataclass(frozen=True)
class LowRank:
    """An update left · right of a weight seen as (d_out, d_in)."""

    left: Float[Tensor, "d_out rank"]
    right: Float[Tensor, "rank d_in"]

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        return self.left @ self.right

    def scaled(self, factor: float) -> LowRank:
        return LowRank(self.left * factor, self.right)

    def plus(self, other: LowRank) -> LowRank:
        return LowRank(torch.cat([self.left, other.left], 1), torch.cat([self.right, other.right], 0))

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def norm(self) -> float:
        """Frobenius norm, from the two small Gram matrices."""
        gram = (self.left.T.double() @ self.left.double()) * (self.right.double() @ self.right.T.double())
        return float(gram.sum().clamp(min=0).sqrt())
