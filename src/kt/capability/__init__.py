"""General abilities before and after an edit, measured by lm-eval (an optional extra) on the loaded model."""

from .run import Abilities, Ability, abilities
from .tasks import GSM8K_TWO_SHOT, PRESETS

__all__ = ["GSM8K_TWO_SHOT", "PRESETS", "Abilities", "Ability", "abilities"]
