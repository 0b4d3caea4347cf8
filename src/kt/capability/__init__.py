"""General abilities before and after an edit, measured by lm-eval (an optional extra) on the loaded model.

Names are imported on first use, so that presets and tasks are looked up without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._util.lazy import attach

if TYPE_CHECKING:
    from .run import Abilities, Ability, abilities
    from .tasks import GSM8K_TWO_SHOT, PRESETS

__all__ = ["GSM8K_TWO_SHOT", "PRESETS", "Abilities", "Ability", "abilities"]

_RUN = dict.fromkeys(("Abilities", "Ability", "abilities"), ".run")

__getattr__, __dir__ = attach(__name__, _RUN | dict.fromkeys(("GSM8K_TWO_SHOT", "PRESETS"), ".tasks"))
