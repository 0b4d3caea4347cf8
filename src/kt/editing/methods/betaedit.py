"""BetaEdit (arXiv 2605.09285): AlphaEdit that also holds what of the old knowledge leaks into the null space."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ...errors import KtError
from .. import closed_form as cf
from ..config import method, setting
from .alphaedit import AlphaEdit


@method("betaedit", "BetaEdit: AlphaEdit that holds what leaks into the null space, and takes it again", place=7)
@dataclass(frozen=True)
class BetaEdit(AlphaEdit):
    """See closed_form.sequential.Leaky."""

    revision = 1  # the demo preset's L2

    L2: float | Literal["auto"] = setting(
        "auto", source="BetaEdit's config: λ₂, 10; auto: λ₁ times the mean of C's inside"
    )
    leak: float | Literal["auto"] = setting(
        "auto",
        symbol="λ₁",
        about="BetaEdit: weight of C inside the null space",
        unit="keys",
        source="BetaEdit's config: lambda1, 3000; the number: kt's own, closed_form.auto_ridge",
    )
    refresh: int = setting(
        1000, about="BetaEdit: earlier keys after which P is taken again", source="BetaEdit's config, P_freq", least=1
    )
    stop_norm: float | Literal["auto"] = setting(
        "auto",
        about="BetaEdit: a larger ‖ΔW‖/√requests is refused; auto: a fifth of ‖W‖",
        source="BetaEdit's code: 20; auto: kt's own",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.leak == 0:
            raise KtError("leak 0 holds nothing of what leaks, which is AlphaEdit; use alphaedit, or a leak above 0")

    def plan(self) -> cf.LocateThenEdit:
        whole = super().plan()
        solver = cf.Leaky(self.nullspace_threshold, self.L2, leak=self.leak, refresh=self.refresh)
        return replace(whole, paths=(replace(whole.paths[0], solver=solver, largest=self.stop_norm),))
