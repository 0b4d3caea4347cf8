"""UnKE (Deng et al. 2025, arXiv 2405.15349): one block trained until its output takes the value that was found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from .. import closed_form as cf
from ..closed_form.config import TargetSearch
from ..config import SQUARED, method, setting
from .rome import middle

if TYPE_CHECKING:
    from ..layer_tuning import LayerTuning

UNKE = "UnKE's code, config.py and unke.py"


@method("unke", "UnKE: every weight of one block, trained until its output takes the value found", place=9)
@dataclass(frozen=True)
class UnKE(TargetSearch):
    """For answers of any length: the value is searched for at the prompt's last token. See kt.editing.layer_tuning."""

    revision = 3  # layers, and presets' search; steps of ten requests
    writes_contexts = False

    # Not the published block, 7 of Llama-2's 32 (its presets have it): there the prompt's last token does not know its
    # subject yet. Of ten KnowEdit facts SmolLM2 takes 7 at that depth and 9 at this one, Gemma 3 none and 6.
    depth = (20, 20, 29)
    # No setting: the KL divergence is read at the subject's last token, and the aim is at the prompt's.
    kl_factor: ClassVar[float] = 0.0  # type: ignore[misc]

    num_steps: int = setting(50, about="UnKE: epochs of the block's training", source=UNKE, least=1, own=True)
    lr: float | Literal["auto"] = setting(
        "auto",
        about="UnKE: AdamW's learning rate in the block's training",
        source="kt's own, fine_tune.RATE; the presets: UnKE's 2e-4",
        own=True,
        most=SQUARED,
    )
    weight_decay: float = setting(
        0.01, about="UnKE: AdamW's weight decay, of matrices", source=UNKE, own=True, most=SQUARED
    )
    # The code's steps take all requests at once, and its authors edit one: 50 such steps take 5 of SmolLM2's hundred.
    batch_size: int = setting(10, about="UnKE: requests per gradient step", source="kt's own", own=True, least=1)
    texts: int = setting(
        20, about="UnKE: unrelated texts on which the block keeps its output", source=UNKE, least=1, own=True
    )

    def plan(self) -> LayerTuning:
        from ..layer_tuning import LayerTuning

        return LayerTuning(
            (middle(self.layers_mlp),),
            num_steps=self.num_steps,
            lr=self.lr,
            weight_decay=self.weight_decay,
            batch_size=self.batch_size,
            stop_loss=0.0,
            search=self.searching(cf.NLL()),
            texts=self.texts,
        )
