"""CORE (Park et al. 2025, arXiv 2505.23026): MEMIT whose targets make contexts matter less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .. import closed_form as cf
from ..config import SQUARED, method, setting
from .memit import MEMIT

CODE = "CoRE hparams/CORE: {} for Llama-3, {} for Mistral"


@method("core", "CORE: MEMIT whose search keeps the stream above alike over contexts", place=2)
@dataclass(frozen=True)
class CORE(MEMIT):
    """See closed_form.objective.ContextVariance. The contexts are kt's; the paper writes each request its own, which
    begin with its subject and its old and new answer."""

    reg_lambda: float | Literal["auto"] = setting(
        "auto",
        symbol="λ",
        about="CORE: weight of the contexts' differences in the stream above; auto: 1, of relative differences",
        source=f"{CODE.format(0.01, 0.1)}; auto: kt's own",
        most=SQUARED,
    )
    layer_range: int = setting(
        28, about="CORE: layers above the last written one that are read", source=CODE.format(28, 26), least=1
    )

    @property
    def objective(self) -> cf.Objective:
        return self.searching(cf.NLL(), cf.StopBelow(), cf.ContextVariance(self.reg_lambda, self.layer_range))
