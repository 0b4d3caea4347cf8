"""JEEP (arXiv 2412.17872): MLP outputs of a low and a high region of layers, searched for together."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from ...errors import KtError
from ...model.sites import Kind, Site
from .. import closed_form as cf
from ..closed_form.config import OwnOutputs, Spreading, TargetSearch
from ..config import LATER, SQUARED, method, one_of, setting

REGIONS = ("both", "low", "high", "joint-low", "joint-high")
"""Both regions, and the ablations: one region alone, or both searched together and one of them written."""

IDLE = {
    "low": ("layers_high", "clamp_norm_factor_high", "v_weight_decay_high", "mom2_update_weight_high", "high_module"),
    "high": ("layers_mlp", "clamp_norm_factor", "v_weight_decay", "spread", "kl_factor"),
}
"""Settings without effect where one region is searched and written alone (the KL divergence is read at the low region's
token)."""


@method("jeep", "JEEP: low and high MLP regions, targets together", place=9)
@dataclass(frozen=True)
class JEEP(OwnOutputs, Spreading, TargetSearch):
    """Eq. 8-12: targets at the low region's subject and at the high region's last prompt token; low is written first,
    with its residual spread by square roots, then high, evenly.

    The original code hooks the high δ at the attention's output but takes the residual at the MLP's; both are the MLP's
    here. Its stop rule is a probability.

    Of Table 4's ablations, `region` has four: `low` and `high` search for one value and write it (w/o δ* & Step3, w/o
    δ' & Step2); `joint-low` and `joint-high` search for both together and write one (w/o Step3, w/o Step2).
    """

    revision = 1  # separate_targets

    layers_high: tuple[int, ...] = setting(
        LATER, symbol="l*..L*", about="JEEP's high region", unit="from 0", source="JEEP D.7"
    )
    spread: str = setting("sqrt", source="JEEP eq. 8-12")
    v_weight_decay: float = setting(0.5, source="JEEP D.7")
    v_num_grad_steps: int = setting(30, source="JEEP D.7")
    mom2_update_weight: float | Literal["auto"] = setting(
        "auto",
        symbol="λ",
        about="weight of what the layer already knows, C₀ = λ E[kkᵀ]",
        unit="keys",
        source="JEEP eq. 8-12; the number: kt's own, closed_form.auto_ridge",
    )
    mom2_update_weight_high: float | Literal["auto"] | None = setting(
        None, symbol="λ*", about="JEEP: λ in the high region", unit="keys", source="JEEP D.7"
    )
    clamp_norm_factor_high: float = setting(
        0.25,
        symbol="γ* (JEEP eq. 12)",
        about="JEEP: largest ‖δ‖ in the high region",
        unit="times ‖v‖",
        source="JEEP eq. 12, D.7",
    )
    v_weight_decay_high: float = setting(
        0.5,
        symbol="β* (JEEP eq. 11)",
        about="JEEP: the same in the high region",
        unit="of ‖δ‖/‖v‖²",
        source="JEEP eq. 11, D.7",
        most=SQUARED,
    )
    min_loss: float = setting(
        0.9, about="JEEP: the search stops at this probability, despite the name", source="JEEP hparams/JEEP"
    )
    region: str = setting(
        "both", about="JEEP's ablation: both, low, high, joint-low, joint-high", source="JEEP table 4"
    )
    separate_targets: bool = setting(
        False,
        about="JEEP's ablation: each region's δ searched for alone, the high one once the low layers are written",
        source="JEEP 5.4, table 4",
    )
    high_module: str = setting(
        "mlp", about="JEEP's ablation: mlp or attn in the high region", source="JEEP table 4, w/ MHSA in Step3"
    )

    by_name = ("high_kind", "chosen_region")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.min_loss <= 1:
            raise KtError(
                f"min_loss {self.min_loss:g} is the probability at which the search stops; give a number above 0, at "
                "most 1"
            )
        if self.separate_targets and (region := self.chosen_region) != "both":
            if region in ("low", "high"):
                raise KtError(f"region {region} has one target alone; leave separate_targets out, or use region=both")
            written = region.removeprefix("joint-")
            raise KtError(f"region {region} searches for both together; leave separate_targets out, or use {written}")

    def refuse_idle(self, given: Collection[str]) -> None:
        region = self.chosen_region
        if idle := [name for name in IDLE.get(region, ()) if name in given]:
            raise KtError(f"{idle[0]} has no use with region={region}; leave it out, or use region=both")

    @property
    def layer_settings(self) -> list[str]:
        """Those of the regions that are searched: the other one's are not probed for either."""
        idle = IDLE.get(self.chosen_region, ())
        return [name for name in super().layer_settings if name not in idle]

    @property
    def high_kind(self) -> Kind:
        return Kind.ATTN if one_of(self.high_module, ("mlp", "attn"), "high_module") == "attn" else Kind.MLP

    @property
    def chosen_region(self) -> str:
        return one_of(self.region, REGIONS, "region")

    @property
    def objective(self) -> cf.Objective:
        return self.searching(cf.NLL(), cf.StopAtProbability(self.min_loss))

    def plan(self) -> cf.LocateThenEdit:
        """The two regions' writes."""
        region, searched = self.chosen_region, self.layer_settings
        writes = {}
        if "layers_mlp" in searched:
            writes["low"] = self._low
        if "layers_high" in searched:
            writes["high"] = self._high
        writes = dict(zip(writes, self.searched_writes(writes.values()), strict=True))
        written = region.removeprefix("joint-")
        chosen = tuple(write for name, write in writes.items() if written in ("both", name))
        also = tuple(write.aim for name, write in writes.items() if written != region and name != written)
        apart = self.separate_targets
        return cf.LocateThenEdit(
            chosen, self.objective, also=also, coupled=True, joint=not apart, searched_in_turn=apart
        )

    @property
    def _low(self) -> cf.Write:
        target = cf.TargetSite(Site(Kind.MLP, self.layers_mlp[-1]), cf.Position.SUBJECT_LAST)
        solver = cf.LeastSquares(self.mom2_update_weight)
        return cf.Write(Kind.MLP, self.layers_mlp, target, solver, spread=self.spread_rule)

    @property
    def _high(self) -> cf.Write:
        target = cf.TargetSite(
            Site(self.high_kind, self.layers_high[-1]),
            cf.Position.PROMPT_LAST,
            self.clamp_norm_factor_high,
            self.v_weight_decay_high,
        )
        weight = self.mom2_update_weight if self.mom2_update_weight_high is None else self.mom2_update_weight_high
        return cf.Write(self.high_kind, self.layers_high, target, cf.LeastSquares(weight))
