"""MEMIT-FE (arXiv 2605.00358): MEMIT with Forward Replay, a target for every layer from one search at the first."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import method, setting
from .memit import MEMIT


@method(
    "memit-fe",
    "MEMIT-FE: Forward Replay; one search at the first layer, its forward gives the others' targets",
    place=2,
)
@dataclass(frozen=True)
class MEMITFE(MEMIT):
    """Each layer is asked for the whole of its residual. `spread=replay` is the same rule in another method."""

    spread: str = setting("replay", source="EasyEdit models/memit_FE")
