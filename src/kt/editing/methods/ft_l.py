"""FT-L (Zhu et al. 2020; Meng et al. 2022): FT that keeps every weight near to where it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..config import method, setting
from .ft import FT


@method("ft-l", "FT-L: FT that keeps every weight within norm_constraint of where it was", place=12)
@dataclass(frozen=True)
class FTL(FT):
    """After each step every weight is put back into [w₀ - ε, w₀ + ε]."""

    norm_constraint: float | Literal["auto"] | None = setting(
        "auto", source="Zhu et al. 2020; the number: kt's own, fine_tune.BOX"
    )
