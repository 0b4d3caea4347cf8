"""AlphaEdit (Fang et al. 2025, arXiv 2410.02355): MEMIT's targets, written into the null space of the second moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...errors import KtError
from ...model.sites import Kind, Site
from .. import closed_form as cf
from ..closed_form.config import AtToken, Spreading
from ..config import method, setting


@method("alphaedit", "AlphaEdit: MEMIT inside the null space of the second moment", place=7)
@dataclass(frozen=True)
class AlphaEdit(Spreading, AtToken):
    """R KᵀP (K KᵀP + Kp KpᵀP + I)⁻¹, Kp the keys of earlier edits, which a session keeps."""

    keeps_history = True

    nullspace_threshold: float | Literal["auto"] = setting(
        "auto",
        symbol="P",
        about="AlphaEdit: singular values of C below it span what P leaves free; auto: the smallest three quarters",
        source="AlphaEdit hparams/AlphaEdit; auto: kt's own",
    )
    L2: float | Literal["auto"] = setting(
        "auto",
        symbol="I",
        about="AlphaEdit, UltraEdit: factor of I in the solve",
        source="AlphaEdit's code; the number: kt's own, closed_form.auto_ridge",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.L2 == 0:
            raise KtError("L2 0 leaves keys alone to make the solve; it must be above zero, or auto")

    def plan(self) -> cf.LocateThenEdit:
        target = cf.TargetSite(Site(Kind.RESID, self.layers_mlp[-1]), self.position)
        solver = cf.NullSpace(self.nullspace_threshold, self.L2)
        write = cf.Write(Kind.MLP, self.layers_mlp, target, solver, spread=self.spread_rule)
        return cf.LocateThenEdit((write,), self.objective)
