"""LyapLock (arXiv 2505.15702): MEMIT whose weight on old knowledge follows what the edits so far have cost."""

from __future__ import annotations

from dataclasses import dataclass

from .. import closed_form as cf
from ..config import method, setting
from .memit import MEMIT


@method("lyaplock", "LyapLock: MEMIT that also takes back what earlier edits changed, by a Lyapunov queue", place=2)
@dataclass(frozen=True)
class LyapLock(MEMIT):
    """See closed_form.sequential.Restoring. A session's first edit is MEMIT's."""

    revision = 1  # presets' λ, and what D₀ is

    keeps_history = True

    cost_budget: float = setting(
        60.0,
        symbol="α",
        about="LyapLock: what the edits may change of old outputs before C weighs more",
        unit="times the first edit's",
        source="LyapLock's README, --alpha",
    )

    @property
    def solver(self) -> cf.LeastSquares:
        return cf.Restoring(self.mom2_update_weight, budget=self.cost_budget)
