"""MELO (Yu et al. 2024, arXiv 2312.11795): GRACE's keys choose a low-rank block, which several requests share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import method, setting
from .grace import GRACE


@method("melo", "MELO: low-rank blocks at one down_proj, chosen by the nearest key; the weights stay", place=19)
@dataclass(frozen=True)
class MELO(GRACE):
    """A block adds to the map's output what its requests need, as a linear map of rank `block_rank`."""

    block_size: int = setting(
        4, about="MELO: requests that share a block, in their order", source="the authors' num_edit_per_block", least=1
    )
    block_rank: int = setting(
        4,
        about="MELO: rank of a block",
        source="kt's own: one a request; the authors' num_rank_per_block is 2",
        least=1,
    )

    @property
    def rule(self) -> dict[str, Any]:
        return {"name": "blocks", "size": self.block_size, "rank": self.block_rank}
