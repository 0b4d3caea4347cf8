"""MEMIT-BLUE (Li et al. 2025, arXiv 2502.03748): MEMIT at the first and last layer, each to its own target."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import method, setting
from .memit import MEMIT


@method("memit-blue", "MEMIT-BLUE: MEMIT at the first and last layer, each searched for at its own output", place=2)
@dataclass(frozen=True)
class MEMITBlue(MEMIT):
    """The second search sees the first write. `spread=blue` is the same rule in another method (AlphaEdit-BLUE)."""

    spread: str = setting("blue", source="BLUE's code, memit/memit_main.py")
