"""Addresses inside a model, and the updates that are written there."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ..errors import UnknownSite


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
