"""IKE (Zheng et al. 2023, arXiv 2305.12740): demonstrations of how facts are used, then the fact, then the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config import method, setting
from .ice import ICE

if TYPE_CHECKING:
    from ..context_edit import InContext


@method("ike", "IKE: demonstrations and the fact are put before prompts; the weights stay", place=21)
@dataclass(frozen=True)
class IKE(ICE):
    """Demonstrations are records about other subjects, those nearest to the fact, one to three to four of the kinds
    copy, update and retain."""

    shots: int = setting(
        16, symbol="k", about="IKE: demonstrations before a fact", source="EasyEdit hparams/IKE; the paper 32", least=1
    )
    demonstrations: str = setting(
        "auto",
        about="IKE: records to show, auto or a facts file with paraphrases and neighbourhood",
        source="the paper has the training set; auto: 16 that ship with kt (for the demo model its facts)",
    )

    def plan(self) -> InContext:
        from ..context_edit import InContext

        return InContext(self.shots, self.demonstrations)
