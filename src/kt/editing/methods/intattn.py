"""IntAttn-Edit (arXiv 2510.27400): MEMIT on down_proj scaled by 1 - α, the same on W_o scaled by α."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ...model.sites import Kind, Site
from .. import closed_form as cf
from ..closed_form.config import AttentionShare
from ..config import method, one_of, setting
from .memit import MEMIT


@method("intattn", "IntAttn-Edit: down_proj and W_o together, scaled 1 - α and α", place=1)
@dataclass(frozen=True)
class IntAttn(AttentionShare, MEMIT):
    """Eq. 6-13. The paper leaves open which value the attention path aims at.

    The default is the residual stream after the last critical attention layer, searched for on its own, as MEMIT does
    for the MLP: every W_o below writes into it, so the spread of eq. 7 adds up. `attn_aim="attn"` takes the output of
    the last layer's W_o (v_attn of eq. 10), which W_o of lower layers can only reach through the attention between;
    docs/demo-edits.md measures both.
    """

    mom2_update_weight_attn: float | Literal["auto"] | None = setting(
        None,
        symbol="λ of W_o",
        about="IntAttn-Edit: λ of the attention path, where not the MLP's",
        unit="keys",
        source="IntAttn-Edit eq. 6, which has one λ",
    )
    attn_aim: str = setting(
        "hidden",
        symbol="v_attn (eq. 10)",
        about="IntAttn-Edit: what the attention path aims at",
        source="IntAttn-Edit eq. 10",
    )

    by_name = ("attn_kind",)

    @property
    def attn_kind(self) -> Kind:
        return Kind(one_of(self.attn_aim, (Kind.ATTN.value, Kind.RESID.value), "attn_aim"))

    def plan(self) -> cf.LocateThenEdit:
        writes = []
        if self.layers_attn and self.share != 0:
            target = cf.TargetSite(Site(self.attn_kind, self.layers_attn[-1]), self.position)
            weight = self.mom2_update_weight_attn
            solver = cf.LeastSquares(self.mom2_update_weight if weight is None else weight)
            writes.append(cf.Write(Kind.ATTN, self.layers_attn, target, solver, self.share, self.spread_rule))
        if self.layers_mlp and self.share != 1:
            writes.append(replace(super().plan().paths[0], scale=self.mlp_share))
        return cf.LocateThenEdit(tuple(writes), self.objective, joint=self.joint_targets, coupled=self.coupled)
