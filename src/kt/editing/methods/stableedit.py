"""StableEdit (arXiv 2605.11836): UltraEdit with whitened gradients, and statistics that begin before the first edit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..config import method, setting
from .ultraedit import UltraEditConfig

if TYPE_CHECKING:
    from ..ultraedit import UltraEdit


@method("stableedit", "StableEdit: UltraEdit with whitened gradients and warmed-up statistics", place=10)
@dataclass(frozen=True)
class StableEdit(UltraEditConfig):
    """See kt.editing.ultraedit.Whitening. Until more pairs (a token of an answer, at each weight whose statistics are
    shared) are seen than a weight has outputs, it is UltraEdit."""

    warmup: str | None = setting(
        None,
        about="StableEdit: facts whose gradients the statistics begin with; none: the requests' own",
        source="StableEdit's code, preheat_mode; its run.sh takes 2,000 facts of the training set",
    )

    def plan(self) -> UltraEdit:
        return replace(super().plan(), whiten=True, warmup=self.warmup)
