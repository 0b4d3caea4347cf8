"""What a target is searched for: a site, a position, and how far δ may go there."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ..sites import Site


class Position(str, Enum):
    """Where a fact is read and written (`fact_token`)."""

    SUBJECT_LAST = "subject_last"
    PROMPT_LAST = "last"


@dataclass(frozen=True)
class Aim:
    """One δ: the value at `site` and `position`. JEEP bounds and decays its two regions apart; None takes the
    objective's own."""

    site: Site
    position: Position = Position.SUBJECT_LAST
    clamp: float | None = None
    decay: float | None = None

    def __str__(self) -> str:
        return str(self.site) if self.position is Position.SUBJECT_LAST else f"{self.site}@{self.position.value}"


@dataclass(frozen=True)
class Objective:
    """How targets are searched for. The names are ROME's and MEMIT's.

    A request stops at a loss below `stop_loss`, or (JEEP) when the target's mean probability over contexts reaches
    `stop_prob`. `argmax_discount` (PMET): while every target token is the argmax in every context, the likelihood
    counts a tenth in the next step, and the search ends when the weighted KL is at most 0.01.
    """

    v_num_grad_steps: int = 25
    v_lr: float = 0.5
    v_weight_decay: float = 1e-3
    kl_factor: float = 0.0625
    clamp_norm_factor: float = 4.0
    stop_loss: float = 5e-2
    stop_prob: float | None = None
    argmax_discount: bool = False
