"""What a patched run replaces: a module's output, the residual stream, or one attention head.

mlp, attn          the output of down_proj, of W_o
hidden             the residual stream after a block
attn.h3            one head: its columns of W_o's input (with GQA too, W_o reads head_dim columns for every query head)
hidden-no-mlp      the residual stream, with the MLP severed: at the patched token its output stays what the run had
hidden-no-attn     that it starts from, in all later blocks; likewise attention (Meng et al. 2022, MEMIT, Figure 3)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from ..errors import BadFact, UnknownSite
from ..sites import Kind, Site

if TYPE_CHECKING:
    from ..model import TracedModel

End = Literal["key", "value"]
MODULES = {"mlp": Kind.MLP, "attn": Kind.ATTN}
SEVERED = "hidden-no-"
EVERY_HEAD = "heads"
KINDS = ("mlp", "attn", "hidden", f"{SEVERED}mlp", f"{SEVERED}attn", EVERY_HEAD)
"""What `kinds` may name; one head is `attn.h3`, and `heads` stands for all of them."""


class Source(NamedTuple):
    """Where a tensor is read and written: a projection's input or output, or a block's output."""

    site: Site
    end: End


@dataclass(frozen=True)
class Patch:
    """One kind of patch; `label` is its name in traces and on the command line."""

    kind: Kind
    head: int | None = None
    severed: Kind | None = None

    @property
    def label(self) -> str:
        if self.head is not None:
            return f"{self.kind}.h{self.head}"
        return str(self.kind) if self.severed is None else f"{SEVERED}{self.severed}"

    @property
    def end(self) -> End:
        return "value" if self.head is None else "key"

    @property
    def is_hidden(self) -> bool:
        return self.kind is Kind.RESID

    def source(self, layer: int) -> Source:
        return Source(Site(self.kind, layer), self.end)

    @classmethod
    def parse(cls, label: str) -> Patch:
        if label.startswith(SEVERED) and (module := MODULES.get(label.removeprefix(SEVERED))):
            return cls(Kind.RESID, severed=module)
        if match := re.fullmatch(r"attn\.h(\d+)", label):
            return cls(Kind.ATTN, head=int(match[1]))
        if label in ("mlp", "attn", "hidden"):
            return cls(Kind(label))
        raise BadFact(f"kinds {label}: choose among {', '.join(KINDS)}, or one head as attn.h0")


def labels(model: TracedModel, kinds: Sequence[str]) -> tuple[str, ...]:
    """The kinds by their labels, each once, `heads` spelled out.

    Raises:
        UnknownSite: the model has no such head, or its heads do not divide W_o's input.
    """
    found: list[str] = []
    for kind in kinds:
        found += [f"attn.h{head}" for head in range(heads(model)[0])] if kind == EVERY_HEAD else [kind]
    for patch in map(Patch.parse, found):
        if patch.head is not None and patch.head >= (count := heads(model)[0]):
            raise UnknownSite(f"{model.name} has heads 0 to {count - 1}, not {patch.head}; choose among these")
    return tuple(dict.fromkeys(found))


def heads(model: TracedModel) -> tuple[int, int]:
    """How many query heads the model has, and how many columns of W_o's input each has."""
    count = int(model.module.config.get_text_config().num_attention_heads)
    columns = model.key_size(Site(Kind.ATTN, 0))
    if columns % count:
        raise UnknownSite(f"{model.name}: W_o reads {columns} columns, which {count} heads do not divide; trace attn")
    return count, columns // count
