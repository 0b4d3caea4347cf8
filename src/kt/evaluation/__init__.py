"""How well an edit holds, reaches further, and leaves the rest alone."""

from .metrics import METRICS
from .run import evaluate
from .samples import Sample
from .scores import Scores

__all__ = ["METRICS", "Sample", "Scores", "evaluate"]
