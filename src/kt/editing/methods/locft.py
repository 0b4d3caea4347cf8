"""LocFT-BF (Yang et al. 2025, arXiv 2509.22072): fine-tuning of one layer, in epochs over shuffled mini-batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ..config import method, setting
from .ft_m import FTM

if TYPE_CHECKING:
    from ..fine_tune import FineTune

LOCFT = "LocFT's code, hparams and fine-tune.py"


@method("locft", "LocFT-BF: FT-M of one layer, shuffled in each epoch, targets with their end of sequence", place=13)
@dataclass(frozen=True)
class LocFT(FTM):
    """Breadth first: an epoch makes one step a mini-batch, and no mini-batch is trained until it is learnt. FT's epochs
    are that already; new are the order, drawn anew in each epoch, and the end of sequence behind each target."""

    depth = (6, 6, 27)  # LocFT's layer of Qwen2.5-7B

    lr: float | Literal["auto"] = setting(
        "auto", source="kt's own, twice fine_tune.RATE, since one layer moves alone; the presets: LocFT's"
    )
    batch_size: int = setting(4, source="kt's own; the presets: LocFT's 100, of 3,000 requests")
    num_steps: int = setting(25, source=LOCFT)
    shuffle: bool = setting(True, about="fine-tuning: draw the order of the requests anew in each epoch", source=LOCFT)
    eos: bool = setting(
        True, about="fine-tuning: the end of sequence is the last token of each target that is trained", source=LOCFT
    )

    def plan(self) -> FineTune:
        from ..fine_tune import RATE

        return replace(super().plan(), shuffle=self.shuffle, eos=self.eos, rate=2 * RATE)
