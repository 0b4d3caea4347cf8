"""FT-WD (JEEP's baseline, arXiv 2412.17872 appendix D.1): FT of whole blocks, with weight decay."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import method, setting
from .ft import FT

JEEP_D1 = "JEEP D.1; JEEP hparams/FT"


@method("ft-wd", "FT-WD: FT of every weight of the chosen blocks (JEEP: one), with weight decay", place=13)
@dataclass(frozen=True)
class FTWD(FT):
    """All parameters of the chosen blocks, with weight decay in Adam and teacher forcing; JEEP's baseline has one."""

    modules: str = setting("block", source=JEEP_D1)
    weight_decay: float = setting(1e-3, source="kt's own; JEEP's files give a power law that its code never applies")
    objective_optimization: str = setting("target_new", source=JEEP_D1)
