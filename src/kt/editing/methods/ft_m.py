"""FT-M (EasyEdit; Zhang et al. 2024, arXiv 2401.01286): FT with the usual loss of the target's tokens."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import method, setting
from .ft import FT


@method("ft-m", "FT-M: FT with teacher forcing, each target token after those before it", place=12)
@dataclass(frozen=True)
class FTM(FT):
    """FT and FT-L ask for all of the target's tokens at the prompt's last token; FT-M for each at its own place."""

    objective_optimization: str = setting("target_new", source="EasyEdit's FT code, objective target_new")
