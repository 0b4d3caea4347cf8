"""NSE (Jiang et al. 2024, arXiv 2410.04045, "Neuron-Level Sequential Editing"): few neurons, several passes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ...errors import KtError
from .. import closed_form as cf
from ..config import method, setting, share
from .memit import MEMIT


@method(
    "nse",
    "NSE: MEMIT in the most active neurons, targets of the unedited weights, in passes",
    place=2,
)
@dataclass(frozen=True)
class NSE(MEMIT):
    """Targets are searched for on the weights from before the session; see closed_form.sequential.ActiveNeurons."""

    revision = 1  # presets' bounds, and the automatic one

    keeps_history = True

    neurons: float = setting(
        0.8,
        symbol="p",
        about="NSE: share of the keys' summed |k| that the written neurons make; 1: all neurons",
        source="NSE's code, neuron_threshold: 0.8 for GPT-J, 1 for Llama-3",
    )
    passes: int = setting(
        2,
        about="NSE: passes over the layers, at most",
        source="NSE's code, max_iterations: 3, whose last one writes nothing",
        least=1,
    )
    residual_least: float | Literal["auto"] = setting(
        "auto",
        symbol="α",
        about="NSE: ‖z - h‖ above which a request is written (again); auto: a tenth of its first",
        source="NSE's code, alpha: 2.5 for Llama-3, 15 for GPT-J; auto: kt's own",
    )
    residual_most: float | Literal["auto"] = setting(
        "auto",
        about="NSE: ‖z - h‖ from which on a request is left alone; auto: ten times the median request's first",
        source="NSE's code, upper_bound: 50 for Llama-3, 100 for GPT-J; auto: kt's own",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        share(self.neurons, "neurons")
        least, most = self.residual_least, self.residual_most
        if most == 0 or (least != "auto" and most != "auto" and least >= most):
            raise KtError(
                f"residual_least {least} and residual_most {most} leave no residual between them, so that nothing is "
                "written; give residual_most the larger number"
            )

    @property
    def solver(self) -> cf.LeastSquares:
        return cf.ActiveNeurons(self.mom2_update_weight, neurons=self.neurons)

    def plan(self) -> cf.LocateThenEdit:
        again = cf.Again(self.passes, self.residual_least, self.residual_most)
        return replace(super().plan(), again=again, rewound=True)
