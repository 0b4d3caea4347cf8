"""CrispEdit (Ikram et al. 2026, arXiv 2602.15823): fine-tuning along directions to which the loss on text is flat."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from ..config import method, setting
from .locft import LocFT

if TYPE_CHECKING:
    from ..projected import Projected

CRISP = "CrispEdit's code and hparams"


@method("crispedit", "CrispEdit: FT-M whose gradients lose the directions that matter to other text (K-FAC)", place=13)
@dataclass(frozen=True)
class CrispEdit(LocFT):
    """See kt.editing.projected for the formula."""

    depth = (15, 19, 27)  # CrispEdit's layers of Qwen2.5-7B

    batch_size: int = setting(4, source="kt's own; the presets: CrispEdit's 32, of 3,000 requests")
    lr: float | Literal["auto"] = setting("auto", source="kt's own, fine_tune.RATE; the presets: CrispEdit's")
    eos: bool = setting(False, source=CRISP)
    energy: float = setting(0.99, about="CrispEdit: share of the curvature's energy that gradients lose", source=CRISP)
    texts: int = setting(
        100, about="CrispEdit: texts from which output gradients are taken", source=f"kt's own; {CRISP}: 1,000", least=1
    )

    def plan(self) -> Projected:
        from ..fine_tune import RATE
        from ..projected import Projected

        known = super().plan()
        shared = {spec.name: getattr(known, spec.name) for spec in fields(known)} | {"rate": RATE}
        return Projected(**shared, energy=self.energy, texts=self.texts)
