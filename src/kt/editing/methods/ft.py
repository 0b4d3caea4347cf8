"""FT (Zhu et al. 2020, arXiv 2012.00363): Adam on the chosen layers' weights, as EasyEdit does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..config import SQUARED, WRITTEN, Config, linear_maps, method, one_of, setting

if TYPE_CHECKING:
    from ..fine_tune import FineTune

EASYEDIT_FT = "rome hparams/FT; EasyEdit hparams/FT"


@method("ft", "FT: Adam on the weights of chosen layers", place=11)
@dataclass(frozen=True)
class FT(Config):
    """See kt.editing.fine_tune for the losses and the order of steps."""

    revision = 1  # presets' layers and batches

    modules: str = setting("mlp", about=WRITTEN, source="EasyEdit's rewrite_module_tmp")
    objective_optimization: str = setting(
        "prompt_last",
        about="fine-tuning: prompt_last (all target tokens at the prompt's end), target_new",
        source=EASYEDIT_FT,
    )
    num_steps: int = setting(25, about="fine-tuning: passes over the requests", source=EASYEDIT_FT, least=1)
    lr: float | Literal["auto"] = setting(
        "auto",
        about="fine-tuning: Adam's learning rate",
        source="kt's own, fine_tune.RATE; the presets: EasyEdit's",
        most=SQUARED,
    )
    weight_decay: float = setting(0.0, about="fine-tuning: Adam's weight decay", source=EASYEDIT_FT, most=SQUARED)
    norm_constraint: float | Literal["auto"] | None = setting(
        None,
        symbol="ε",
        about="FT-L: how far each weight may move, ‖ΔW‖∞ ≤ ε",
        source="Zhu et al. 2020; rome hparams/FT",
    )
    batch_size: int = setting(8, about="fine-tuning: requests per gradient step", source="kt's own", least=1)
    stop_loss: float = setting(
        1e-2, about="fine-tuning: a mean loss below it ends the training", unit="nats", source="rome's FT code"
    )

    by_name = ("maps", "objective")

    @property
    def maps(self) -> tuple[str, ...]:
        return () if self.modules == "block" else linear_maps(self.modules, ("block",))

    @property
    def objective(self) -> str:
        return one_of(self.objective_optimization, ("prompt_last", "target_new"), "objective_optimization")

    def plan(self) -> FineTune:
        from ..fine_tune import FineTune

        return FineTune(
            self.layers_mlp,
            self.modules,
            self.objective,
            num_steps=self.num_steps,
            lr=self.lr,
            weight_decay=self.weight_decay,
            norm_constraint=self.norm_constraint,
            batch_size=self.batch_size,
            stop_loss=self.stop_loss,
        )
