"""WISE (Wang et al. 2024, arXiv 2405.14768): a side memory of one down_proj, read where a request's own output is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..closed_form.config import AtToken
from ..config import method, setting, share
from .rome import middle

if TYPE_CHECKING:
    from ..adapter_edit import Codebook


@method("wise", "WISE: a side memory of one down_proj, read where a request's output is; the weights stay", place=19)
@dataclass(frozen=True)
class WISE(AtToken):
    """Of several layers the middle one, as ROME's."""

    revision = 2  # a token reads the memory for a request's own part, not for the length of the output

    effect: ClassVar[str] = "adapter"

    ratio: float = setting(
        0.7,
        symbol="ε",
        about="WISE: a token reads the memory if it holds at least this part of a request's own change there",
        source="WISE section 3.2; the number and the measure: kt's own",
    )
    shard_size: int = setting(
        500, about="WISE: requests of a shard, which has inputs of its own", source="EasyEdit hparams/WISE", least=1
    )
    density: float = setting(
        1.0, symbol="ρ", about="WISE: share of the inputs that a shard writes", source="kt's own; EasyEdit's WISE: 0.2"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        share(self.ratio, "ratio")
        share(self.density, "density")

    @property
    def rule(self) -> dict[str, Any]:
        return {"name": "part", "size": self.shard_size, "share": self.density}

    def plan(self) -> Codebook:
        from ..adapter_edit import Codebook
        from ..side_memory import Rule

        rule = Rule(position=self.fact_token, **self.rule)
        return Codebook(middle(self.layers_mlp), self.radius, False, self.objective, rule)

    @property
    def radius(self) -> float:
        return self.ratio
