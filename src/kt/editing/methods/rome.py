"""ROME (Meng et al. 2022, arXiv 2202.05262): one layer, rank one, fact by fact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import KtError
from ...model.sites import Kind, Site
from .. import closed_form as cf
from ..closed_form.config import AtToken, require_below_one
from ..closed_form.contexts import Contexts, rome_contexts
from ..config import method, setting

if TYPE_CHECKING:
    from ...model.model import TracedModel


def middle(layers: tuple[int, ...]) -> int:
    """The middle layer, of an even number the lower one: the papers' choice within MEMIT's on GPT-J and LLaMA-7B."""
    return layers[(len(layers) - 1) // 2]


@method("rome", "ROME: rank one on one down_proj, fact by fact", place=3)
@dataclass(frozen=True)
class ROME(AtToken):
    """Eq. 2. The direction takes the mean key over contexts, the denominator the bare prompt's, as the code does.

    `held_share` and `key_cosine` are kt's own: what one exact update after the other costs otherwise.
    """

    mom2_adjustment: bool = setting(
        True,
        symbol="C⁻¹ (ROME eq. 2)",
        about="ROME: whether the second moment enters the direction u = C⁻¹k",
        source="ROME eq. 2; false in EasyEdit hparams/ROME",
    )

    held_share: float = setting(
        0.99,
        about="ROME: share that is held back of what a fact's update changes at keys that the batch wrote before it",
        source="kt's own; 0 is ROME eq. 2",
    )

    key_cosine: float = setting(
        0.75,
        about="ROME: cosine of a fact's bare and mean key, by the update's metric, below which the update meets both",
        source="kt's own; 0 is ROME eq. 2",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_below_one(held_share=self.held_share, key_cosine=self.key_cosine)
        # Neither 0 nor the default is refused: presets have the one, and nobody gave the other.
        if not self.mom2_adjustment and self.held_share not in (0, type(self).held_share):
            raise KtError(
                f"held_share {self.held_share:g} has no use with mom2_adjustment=false, which leaves out the second "
                "moment that it weighs; leave out one of them"
            )

    @classmethod
    def contexts(cls, model: TracedModel, seed: int) -> Contexts:
        return rome_contexts(model, seed)

    @property
    def solver(self) -> cf.RankOne:
        return cf.RankOne(self.mom2_adjustment, held_share=self.held_share, key_cosine=self.key_cosine)

    def plan(self) -> cf.LocateThenEdit:
        return cf.LocateThenEdit((self.write_mlp(),), self.objective, one_by_one=True)

    def write_mlp(self) -> cf.Write:
        """The write of one down_proj, which aims at its own output: of several layers the middle one's, where a trace's
        window has its peak."""
        layer = middle(self.layers_mlp)
        return cf.Write(Kind.MLP, (layer,), cf.TargetSite(Site(Kind.MLP, layer), self.position), self.solver)
