"""ICE (in-context editing, Cohen et al. 2023, arXiv 2307.12976): the fact alone, before the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import KtError
from ..config import Config, method, one_of, setting

if TYPE_CHECKING:
    from ..context_edit import InContext


@method("ice", "ICE: the fact is put before prompts; the weights stay", place=20)
@dataclass(frozen=True)
class ICE(Config):
    """Of the edit's facts, the one that is nearest to the prompt."""

    effect: ClassVar[str] = "context"
    writes_contexts = False
    layers_mlp: ClassVar[tuple[int, ...]] = ()  # type: ignore[misc]  # no setting: nothing is written

    retriever: str = setting(
        "bm25",
        about="how the nearest fact is found, bm25 (by words) or embeddings (by the model's own states)",
        source="kt's own; the papers have the embeddings of another model",
    )
    nearness: float = setting(
        0.6, about="least cosine at which retriever=embeddings finds a fact near", source="kt's own", least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.retriever, ("bm25", "embeddings"), "retriever")
        if self.nearness > 1:
            raise KtError(f"nearness {self.nearness:g} is a cosine; give a number from 0 to 1")
        if self.retriever != "embeddings" and self.nearness != type(self).nearness:
            raise KtError(
                f"nearness {self.nearness:g} has no use with retriever={self.retriever}, which finds facts by words; "
                "leave it out, or give retriever=embeddings"
            )

    @property
    def retrieval(self) -> dict[str, Any]:
        """How facts are found, as the plan takes it."""
        return {"retriever": self.retriever, "nearness": self.nearness}

    def plan(self) -> InContext:
        from ..context_edit import InContext

        return InContext(**self.retrieval)
