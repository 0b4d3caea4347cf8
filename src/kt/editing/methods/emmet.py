"""EMMET (Gupta et al. 2024, arXiv 2403.14236, "A Unified Framework for Model Editing"): MEMIT with equality."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from .. import closed_form as cf
from ..config import method, setting
from .memit import MEMIT, require_moment


@method("emmet", "EMMET: MEMIT with equality constraints: every key takes its value exactly", place=8)
@dataclass(frozen=True)
class EMMET(MEMIT):
    """MEMIT's targets, memorised exactly: of all updates that give every key its value, the one that moves what C
    holds least (`emmet_lambda=0`, the paper's).

    For more than one fact the code adds `emmet_lambda` to the diagonal of KᵀC⁻¹K: that is MEMIT's update with
    λ = emmet_lambda · mom2_update_weight.
    """

    mom2_update_weight: float | Literal["auto"] = setting(1.0, source="EasyEdit hparams/EMMET")
    emmet_lambda: float | Literal["auto"] = setting(
        "auto",
        symbol="λ",
        about="EMMET: added to the diagonal of KᵀC⁻¹K; the paper has none",
        source="EasyEdit hparams/EMMET; the number: kt's own, closed_form.auto_ridge",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_moment(self.mom2_update_weight)

    def plan(self) -> cf.LocateThenEdit:
        write = replace(super().plan().paths[0], solver=cf.Equality(self.mom2_update_weight, self.emmet_lambda))
        return cf.LocateThenEdit((write,), self.objective)
