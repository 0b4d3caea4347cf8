"""ENCORE (Gupta et al. 2025, arXiv 2502.01636): MEMIT with a price on ΔW's norm, and a search that stops early."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .. import closed_form as cf
from ..config import method, setting
from .memit import MEMIT, require_moment


@method("encore", "ENCORE: MEMIT with a price on the update's norm, and a search that stops early", place=2)
@dataclass(frozen=True)
class ENCORE(MEMIT):
    """The norm constraint is λₙI in the solve; the search stops soon after the target is the likeliest (MPES)."""

    revision = 1  # presets' clamp and decay

    keeps_history = True

    update_norm_lambda: float | Literal["auto"] = setting(
        "auto",
        symbol="λₙ",
        about="ENCORE: weight of ‖ΔW‖² in the solve; auto: λ times the mean of C's eigenvalues",
        source="ENCORE's code, update_norm_lambda; auto: kt's own",
    )
    stop_after: int = setting(
        2,
        about="ENCORE: the search ends at the so many-th step at which every target token is the likeliest",
        source="ENCORE's code, prob_cutoff: 2 for Llama-3, 4 for GPT-2-XL",
        least=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_moment(self.mom2_update_weight)

    @property
    def objective(self) -> cf.Objective:
        return self.searching(cf.NLL(), cf.StopAfterArgmax(self.stop_after), cf.StopBelow())

    @property
    def solver(self) -> cf.LeastSquares:
        return cf.NormConstrained(self.mom2_update_weight, ridge=self.update_norm_lambda)
