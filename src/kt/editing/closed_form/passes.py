"""Several passes over the layers (NSE): which requests each of them writes."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...errors import NothingToWrite, warn_user

SAME = 1e-4
"""‖δ‖ / ‖h‖ up to which nothing was found for a request: the model says its target already."""


class Again(NamedTuple):
    """Further passes over the layers, for the requests whose ‖z - h‖ lies between `low` and `high` (NSE).

    Automatic: above a tenth of what was missing at first, below ten times what the median request missed at first, of
    those for which a δ was found (where the model says the target already, there is none).
    """

    passes: int
    low: float | Literal["auto"]
    high: float | Literal["auto"]

    def chosen(
        self, missing: Float[Tensor, " fact"], first: Float[Tensor, " fact"], asks: Bool[Tensor, " fact"]
    ) -> list[int]:
        """Those to write; `asks` says which have a δ."""
        low = 0.1 * first if self.low == "auto" else torch.full_like(first, self.low)
        return ((missing > low) & (missing < self.most(first, asks))).nonzero()[:, 0].tolist()

    def most(self, first: Float[Tensor, " fact"], asks: Bool[Tensor, " fact"]) -> float:
        """‖z - h‖ from which on a request is left alone."""
        if self.high != "auto":
            return self.high
        return 10 * float((first[asks] if asks.any() else first).median())


class Missing:
    """How far requests are from their wanted values, from pass to pass.

    Args:
        again: the bounds.
        wanted: z of each request.
        before: h of each request where δ was searched for.
        guarded: a norm guard stands in the session. It leaves a request alone by giving it its own value, which is the
            unedited model's here, since NSE searches there: there is nothing to write back.
    """

    def __init__(
        self,
        again: Again,
        wanted: Float[Tensor, "fact d_model"],
        before: Float[Tensor, "fact d_model"],
        guarded: bool,
    ) -> None:
        self.again, self.wanted = again, wanted.double()
        found = (wanted - before).double().norm(dim=-1)
        self.asks = found > SAME * before.double().norm(dim=-1)
        self.alone = (found == 0) & guarded
        self.first: Float[Tensor, " fact"] | None = None

    def chosen(self, now: Float[Tensor, "fact d_model"]) -> list[int]:
        """The requests that the next pass writes, from h as it is now; those that miss too much are told once."""
        missing = (self.wanted - now.to(self.wanted.device)).norm(dim=-1)
        if self.first is None:
            self.first = missing
            most = self.again.most(missing, self.asks)
            if far := int(((missing >= most) & ~self.alone).sum()):
                warn_user(
                    f"{far} of {len(missing)} requests miss residual_most {most:.3g} or more and are left as they are; "
                    "give a larger residual_most to edit them"
                )
        return [fact for fact in self.again.chosen(missing, self.first, self.asks) if not self.alone[fact]]

    def nothing(self) -> NothingToWrite:
        """The error of a walk that wrote no request."""
        if self.alone.all():
            return NothingToWrite(
                "the norm guard leaves every request as it is, and nothing would be written; take its anchor over more "
                "facts (norm_facts), or leave the guard out"
            )
        return NothingToWrite(
            f"no residual lies between residual_least {self.again.low} and residual_most {self.again.high}; nothing "
            "would be written; give a smaller residual_least or a larger residual_most"
        )
