"""FT-L (Zhu et al. 2020; Meng et al. 2022): FT that keeps every weight near to where it was."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import method, setting
from .ft import FT


@method("ft-l", "FT-L: FT that keeps every weight within norm_constraint of where it was", place=12)
@dataclass(frozen=True)
class FTL(FT):
    """After each step every weight is put back into [w₀ - ε, w₀ + ε]."""

    norm_constraint: float | None = setting(5e-4, source="Zhu et al. 2020; rome hparams/FT")
