"""LoRA (Hu et al. 2022, arXiv 2106.09685) through peft, on the weights that the other methods write."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...errors import install_hint
from ..config import method, setting
from .ft import FT

if TYPE_CHECKING:
    from ..fine_tune import FineTune

EASYEDIT_LORA = "EasyEdit hparams/LoRA"


@method("lora", f"LoRA: a low-rank adapter trained through peft ({install_hint('lora')})", place=14)
@dataclass(frozen=True)
class LoRA(FT):
    """ΔW = (α / r) B A (section 4.1), trained with teacher forcing; `norm_constraint` has no meaning for it."""

    num_steps: int = setting(30, source="kt's own")
    stop_loss: float = setting(0.0, source="kt's own")
    objective_optimization: str = setting("target_new", source=EASYEDIT_LORA)
    rank: int = setting(8, symbol="r", about="LoRA: rank of the update", source="LoRA section 4.1", least=1)
    lora_alpha: float = setting(
        32.0, symbol="α", about="LoRA: the update is scaled by α / r", source="LoRA section 4.1"
    )
    lora_dropout: float = setting(
        0.0, about="LoRA: share of its input that is dropped while training", source="LoRA section 4.1"
    )

    def plan(self) -> FineTune:
        from ..adapter import Adapter

        adapter = Adapter(self.rank, self.lora_alpha, self.lora_dropout)
        return replace(super().plan(), norm_constraint=None, adapter=adapter)
