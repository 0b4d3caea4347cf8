"""IKE (Zheng et al. 2023, arXiv 2305.12740): demonstrations of how facts are used, then the fact, then the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config import method, one_of, setting
from .ice import ICE

if TYPE_CHECKING:
    from ..context_edit import InContext


@method("ike", "IKE: demonstrations and the fact are put before prompts; the weights stay", place=21)
@dataclass(frozen=True)
class IKE(ICE):
    """Demonstrations are records about other subjects, those nearest to the fact: copied, updated, retained."""

    shots: int = setting(
        8,
        symbol="k",
        about="IKE: demonstrations before a fact",
        source="kt's own; EasyEdit hparams/IKE 16, the paper 32",
        least=1,
    )
    kinds: str = setting(
        "own",
        about="IKE: kinds of demonstrations, own (2 copy, 1 update, 1 retain) or paper (1, 3, 4)",
        source="kt's own",
    )
    demonstrations: str = setting(
        "auto",
        about="IKE: records to show, auto or a facts file with paraphrases and neighbourhood",
        source="the paper has the training set; auto: 16 that ship with kt (for the demo model its facts)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.kinds, ("own", "paper"), "kinds")

    def plan(self) -> InContext:
        from ..context_edit import InContext

        return InContext(self.shots, self.demonstrations, self.kinds, **self.retrieval)
