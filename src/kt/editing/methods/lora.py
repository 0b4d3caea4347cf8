"""LoRA (Hu et al. 2022, arXiv 2106.09685) through peft, on the weights that the other methods write."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from ...errors import KtError, install_hint
from ..config import SQUARED, method, setting
from .ft import FT

if TYPE_CHECKING:
    from ...model.model import TracedModel
    from ..fine_tune import FineTune

EASYEDIT_LORA = "EasyEdit hparams/LoRA"


@method("lora", f"LoRA: a low-rank adapter trained through peft ({install_hint('lora')})", place=14)
@dataclass(frozen=True)
class LoRA(FT):
    """ΔW = (α / r) B A (section 4.1), trained with teacher forcing."""

    # No setting: it bounds weights, and the adapter leaves them as they are.
    norm_constraint: ClassVar[None] = None  # type: ignore[misc]

    num_steps: int = setting(30, source="kt's own")
    stop_loss: float = setting(0.0, source="kt's own")
    objective_optimization: str = setting("target_new", source=EASYEDIT_LORA)
    rank: int = setting(8, symbol="r", about="LoRA: rank of the update", source="LoRA section 4.1", least=1)
    lora_alpha: float = setting(
        32.0,
        symbol="α",
        about="LoRA: the update is scaled by α / r",
        source="LoRA section 4.1",
        most=SQUARED,
    )
    lora_dropout: float = setting(
        0.0, about="LoRA: share of its input that is dropped while training", source="LoRA section 4.1"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_dropout >= 1:
            raise KtError(f"lora_dropout {self.lora_dropout:g} must be a share below 1; 1 drops all that is trained on")
        if self.lora_alpha == 0:
            raise KtError("lora_alpha 0 scales the update to nothing; give a number above 0")

    def require(self, model: TracedModel) -> None:
        super().require(model)
        if self.rank > model.d_model:
            raise KtError(
                f"rank {self.rank:,} is above {model.d_model:,}, the width of {model.name}: no update needs a higher "
                f"one; give {model.d_model:,} at most"
            )

    def plan(self) -> FineTune:
        from ..adapter import Adapter

        adapter = Adapter(self.rank, self.lora_alpha, self.lora_dropout)
        return replace(super().plan(), adapter=adapter)
