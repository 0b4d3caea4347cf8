"""The contrast probe: where in the model two answers part, read through the model's own unembedding."""

from .lens import KINDS, POSITIONS, Reading, SetTokens, read_lens
from .probe import contrast_probe
from .residual import Residual
from .residual_run import residual_fact
from .result import LensCurve, Probe
from .stages import Stage, Stages

__all__ = [
    "KINDS",
    "POSITIONS",
    "LensCurve",
    "Probe",
    "Reading",
    "Residual",
    "SetTokens",
    "Stage",
    "Stages",
    "contrast_probe",
    "read_lens",
    "residual_fact",
]
