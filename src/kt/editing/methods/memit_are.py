"""AnyEdit's MEMIT-ARE (Jiang et al. 2025, arXiv 2502.05628): MEMIT for long answers, an aim for each part."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .. import closed_form as cf
from ..closed_form.config import InParts
from ..config import method
from .memit import MEMIT


@method("memit-are", "MEMIT-ARE: MEMIT for long answers, an aim for each part of the answer", place=8)
@dataclass(frozen=True)
class MEMITARE(InParts, MEMIT):
    """At the last token before each part; the keys of the answer's other tokens are held."""

    def plan(self) -> cf.LocateThenEdit:
        return replace(super().plan(), window=self.window)
