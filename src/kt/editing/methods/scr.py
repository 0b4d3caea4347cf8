"""SCR (selective contextual reasoning, arXiv 2505.18690): retrieve facts, select one by the model, answer behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config import method, setting
from .ice import ICE

if TYPE_CHECKING:
    from ..context_edit import InContext


@method("scr", "SCR: as ICE, where the model confirms that the fact answers the prompt", place=22)
@dataclass(frozen=True)
class SCR(ICE):
    """A prompt that no retrieved fact answers, as the model itself says, is read as it is."""

    candidates: int = setting(
        3,
        about="SCR: nearest facts that the model is asked about",
        source="SCR; the number: kt's own",
        least=1,
    )

    def plan(self) -> InContext:
        from ..context_edit import InContext

        return InContext(select=self.candidates, **self.retrieval)
