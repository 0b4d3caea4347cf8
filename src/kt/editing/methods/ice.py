"""ICE (in-context editing, Cohen et al. 2023, arXiv 2307.12976): the fact alone, before the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..closed_form.contexts import Contexts
from ..config import Config, method

if TYPE_CHECKING:
    from ...model.model import TracedModel
    from ..context_edit import InContext


@method("ice", "ICE: the fact is put before prompts; the weights stay", place=20)
@dataclass(frozen=True)
class ICE(Config):
    """Of the edit's facts, the one whose words are nearest to the prompt's."""

    effect: ClassVar[str] = "context"
    layers_mlp: ClassVar[tuple[int, ...]] = ()  # type: ignore[misc]  # no setting: nothing is written

    @staticmethod
    def contexts(model: TracedModel, seed: int) -> Contexts:
        return Contexts()

    def plan(self) -> InContext:
        from ..context_edit import InContext

        return InContext()
