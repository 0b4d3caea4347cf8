"""IntAttn-Edit for ROME (arXiv 2510.27400, supplement B.3): rank one on one down_proj and on one W_o."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...model.sites import Kind, Site
from .. import closed_form as cf
from ..closed_form.config import AttentionShare
from ..config import method
from .rome import ROME


@method("intattn-rome", "IntAttn-Edit for ROME: rank one on one down_proj and one W_o", place=5)
@dataclass(frozen=True)
class IntAttnROME(AttentionShare, ROME):
    """One layer each, scaled 1 - α and α; each aims at its own module's output."""

    def plan(self) -> cf.LocateThenEdit:
        writes = []
        if self.layers_attn and self.share != 0:
            layer = self.layers_attn[-1]
            target = cf.TargetSite(Site(Kind.ATTN, layer), self.position)
            writes.append(cf.Write(Kind.ATTN, (layer,), target, self.solver, self.share))
        if self.share != 1:
            writes.append(replace(self.write_mlp(), scale=self.mlp_share))
        return cf.LocateThenEdit(
            tuple(writes), self.objective, joint=self.joint_targets, coupled=self.coupled, one_by_one=True
        )
