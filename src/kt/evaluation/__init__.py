"""Evaluation of edits: efficacy, generalisation, portability, locality and fluency."""

from .cached import evaluate_cached
from .distributions import Distributions, distributions
from .judge import Judge
from .metrics import METRICS, PROTOCOLS
from .run import evaluate
from .samples import Sample
from .scores import Scores

__all__ = [
    "METRICS",
    "PROTOCOLS",
    "Distributions",
    "Judge",
    "Sample",
    "Scores",
    "distributions",
    "evaluate",
    "evaluate_cached",
]
