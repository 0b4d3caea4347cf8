"""Addresses inside a model: the residual stream, and the linear maps of a block."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .._util.kinds import COUNT, TEXT, require_kinds
from ..errors import UnknownSite


class Kind(str, Enum):
    """Part of a block: its residual stream (after the block), its attention, or its MLP."""

    RESID = "hidden"
    ATTN = "attn"
    MLP = "mlp"

    def __str__(self) -> str:
        return self.value


SITE = {"kind": ((str,), "attn, mlp, hidden, or mlp.up_proj"), "layer": COUNT, "role": TEXT}
OUTPUT = {Kind.ATTN: "o_proj", Kind.MLP: "down_proj"}
"""Role of the linear map whose output is the module's own. A site of a kind alone means this map."""


@dataclass(frozen=True, order=True, init=False)
class Site:
    """One linear map, or the residual stream, at one layer: a dict key, a JSON string, a command-line word.

    `Site(Kind.MLP, 5)`, `Site("mlp", 5)` and `Site("mlp.down_proj", 5)` are the same site, written `mlp.5`; likewise
    `attn` and W_o (`attn.o_proj`). `Site("mlp.up_proj", 5)` is another linear map of that MLP, written `mlp.up_proj.5`.
    `TracedModel.site` also takes the module's own path and checks that the model has the map.

    Attributes:
        kind: Part of the block.
        layer: Block number, from 0.
        role: Name of the linear map in its part; empty for W_o, down_proj and the residual stream.

    Examples:
        >>> str(kt.Site("mlp", 5)), kt.Site("mlp.down_proj", 5) == kt.Site("mlp", 5)
        ('mlp.5', True)
    """

    kind: Kind
    layer: int
    role: str

    def __init__(self, kind: Kind | str, layer: int, role: str = "") -> None:
        require_kinds({"kind": kind, "layer": layer, "role": role}, SITE, UnknownSite)
        part, _, named = (kind.value if isinstance(kind, Kind) else kind).partition(".")
        role = role or named
        try:
            found = Kind(part)
        except ValueError:
            raise UnknownSite(f"{kind!r} is no part of a block; write attn, mlp, hidden, or mlp.up_proj") from None
        if found is Kind.RESID and role:
            raise UnknownSite(f"the residual stream has no linear map {role!r}; write attn.{role} or mlp.{role}")
        object.__setattr__(self, "kind", found)
        object.__setattr__(self, "layer", layer)
        object.__setattr__(self, "role", "" if role == OUTPUT.get(found) else role)

    @property
    def name(self) -> str:
        """The site without its layer: `hidden`, or part and role, such as `mlp.down_proj` or `attn.q_proj`."""
        role = self.role or OUTPUT.get(self.kind)
        return f"{self.kind}.{role}" if role else str(self.kind)

    def __str__(self) -> str:
        return f"{self.kind}.{self.role}.{self.layer}" if self.role else f"{self.kind}.{self.layer}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """The site that `str` wrote.

        Raises:
            UnknownSite: the text is not a part of a block and a layer.
        """
        name, _, layer = text.rpartition(".")
        try:
            return cls(name, int(layer))
        except (ValueError, UnknownSite):
            raise UnknownSite(f"{text!r} is no site; write kind.layer, such as mlp.5 or mlp.up_proj.5") from None
