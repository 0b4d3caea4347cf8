"""MEMIT (Meng et al. 2023, arXiv 2210.07229): W += R Kᵀ (λC + K Kᵀ)⁻¹, the residual spread over several layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...errors import KtError
from ...model.sites import Kind, Site
from .. import closed_form as cf
from ..closed_form.config import AtToken, Spreading
from ..config import method, setting


@method("memit", "MEMIT: down_proj over several layers, closed form", place=2)
@dataclass(frozen=True)
class MEMIT(Spreading, AtToken):
    """Eq. 14-20: aims at the residual stream after the last layer, writes every down_proj."""

    mom2_update_weight: float | Literal["auto"] = setting(
        "auto",
        symbol="λ",
        about="weight of what the layer already knows, C₀ = λ E[kkᵀ]",
        unit="keys",
        source="MEMIT eq. 14, 15; the number: kt's own, closed_form.auto_ridge",
    )

    @property
    def target(self) -> cf.TargetSite:
        """The residual stream after the last layer."""
        return cf.TargetSite(Site(Kind.RESID, self.layers_mlp[-1]), self.position)

    @property
    def solver(self) -> cf.LeastSquares:
        return cf.LeastSquares(self.mom2_update_weight)

    def plan(self) -> cf.LocateThenEdit:
        write = cf.Write(Kind.MLP, self.layers_mlp, self.target, self.solver, spread=self.spread_rule)
        return cf.LocateThenEdit((write,), self.objective)


def require_moment(weight: float | str) -> None:
    """Refuse a `mom2_update_weight` of 0 in a method whose solve needs the second moment.

    Raises:
        KtError: it is 0.
    """
    if weight == 0:
        raise KtError(
            "mom2_update_weight 0 leaves the second moment out, and keys alone do not make the solve; "
            "give a number above 0, or auto"
        )
