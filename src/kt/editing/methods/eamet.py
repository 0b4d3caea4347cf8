"""EAMET (arXiv 2505.11876): MEMIT whose targets lie to each other as their keys do."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...errors import KtError
from .. import closed_form as cf
from ..config import SQUARED, method, setting
from .memit import MEMIT

CODE = "EasyEdit hparams/EAMET/qwen2.5-7b"


@method("eamet", "EAMET: MEMIT whose changes lie to each other as their keys do", place=2)
@dataclass(frozen=True)
class EAMET(MEMIT):
    """See closed_form.objective.Aligned. Requests are searched for one after the other, so a search of n takes n times
    as many forwards as MEMIT's."""

    cs_factor: float = setting(
        1.0, about="EAMET: weight of KL(p ‖ q), p and q from keys and changes", source=CODE, most=SQUARED
    )
    mse_factor: float = setting(
        1.0, about="EAMET: weight of the squares of the cosines' differences", source=CODE, most=SQUARED
    )
    tau: float = setting(0.07, symbol="τ", about="EAMET: temperature of both softmaxes", source=CODE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau == 0:
            raise KtError("tau 0 is a temperature that cosines are divided by; give a number above 0")

    @property
    def objective(self) -> cf.Objective:
        return self.searching(cf.NLL(), cf.StopBelow(0.01))

    def plan(self) -> cf.LocateThenEdit:
        return replace(super().plan(), aligned=cf.Alignment(self.cs_factor, self.mse_factor, self.tau))
