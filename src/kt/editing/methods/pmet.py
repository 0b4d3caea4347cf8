"""PMET (Li et al. 2024, arXiv 2308.08742): δ at the outputs of attention and MLP, searched together."""

from __future__ import annotations

from dataclasses import dataclass

from ...model.sites import Kind, Site
from .. import closed_form as cf
from ..closed_form.config import OwnOutputs
from ..config import method, one_of, setting
from .memit import MEMIT


@method("pmet", "PMET: attention and MLP targets together, down_proj written", place=6)
@dataclass(frozen=True)
class PMET(OwnOutputs, MEMIT):
    """Both δ stand in the last layer. Only the MLP is written; `modules="both"` writes both, as its code can.

    The paper searches for attention's δ as well and throws it away, adds the MLP's in the last layer where the write
    adds its shares in all, and ends as soon as the target is the likeliest. What is written then need not give the
    answer: without a preset the search adds what will be written, and goes on to MEMIT's loss.
    """

    spread: str = setting("sqrt", source="PMET's code")
    v_weight_decay: float = setting(0.5, source="PMET hparams/PMET")
    modules: str = setting(
        "mlp", about="weights of a layer that are written: mlp, both", source="PMET's code, which can write W_o"
    )

    by_name = ("both_modules",)

    @property
    def both_modules(self) -> bool:
        return one_of(self.modules, ("mlp", "both"), "modules") == "both"

    @property
    def objective(self) -> cf.Objective:
        if self.searches_written:
            return self.searching(cf.NLL(), cf.StopBelow())
        return self.searching(cf.DiscountedNLL(), cf.StopBelow(), cf.StopAtArgmax(self.kl_factor))

    def plan(self) -> cf.LocateThenEdit:
        mlp, attn = (cf.TargetSite(Site(kind, self.layers_mlp[-1]), self.position) for kind in (Kind.MLP, Kind.ATTN))
        both = self.both_modules
        written = [(Kind.MLP, mlp)] + [(Kind.ATTN, attn)] * both
        writes = [cf.Write(k, self.layers_mlp, t, self.solver, spread=self.spread_rule) for k, t in written]
        also = () if both or self.searches_written else (attn,)
        return cf.LocateThenEdit(self.searched_writes(writes), self.objective, joint=True, also=also)
