"""The contrast probe: the layers where two answers diverge, read through the model's own unembedding."""

from .contrast import contrast_probe
from .lens import KINDS, POSITIONS, LensReading, read_lens
from .result import LensCurve, Probe
from .stages import Stage, Stages
from .word_sets import SetTokens

__all__ = [
    "KINDS",
    "POSITIONS",
    "LensCurve",
    "LensReading",
    "Probe",
    "SetTokens",
    "Stage",
    "Stages",
    "contrast_probe",
    "read_lens",
]
