"""MEMOIR (Wang et al. 2025, arXiv 2506.07899): a memory beside one down_proj, each request on its own inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..closed_form.config import AtToken
from ..config import method, setting, share
from .rome import middle

if TYPE_CHECKING:
    from ..adapter_edit import Codebook


@method(
    "memoir", "MEMOIR: a memory beside one down_proj, masked by the inputs of a request; the weights stay", place=19
)
@dataclass(frozen=True)
class MEMOIR(AtToken):
    """Of several layers the middle one, as ROME's."""

    effect: ClassVar[str] = "adapter"

    overlap: float = setting(
        0.5,
        symbol="τ",
        about="MEMOIR: a token reads the memory if its mask shares at least this part of a request's",
        source="MEMOIR; the number: kt's own (the authors' 0.4 to 0.46 is of a mean over the prompt)",
    )
    top: float = setting(
        0.285, symbol="k", about="MEMOIR: share of the inputs in a mask", source="the authors' 4,096 of 14,336"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        share(self.overlap, "overlap")
        share(self.top, "top")

    @property
    def rule(self) -> dict[str, Any]:
        return {"name": "overlap", "share": self.top}

    def plan(self) -> Codebook:
        from ..adapter_edit import Codebook
        from ..side_memory import Rule

        rule = Rule(position=self.fact_token, **self.rule)
        return Codebook(middle(self.layers_mlp), self.overlap, False, self.objective, rule)
