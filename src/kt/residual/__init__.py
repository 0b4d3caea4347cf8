"""The residual check: the part of the old fact that an edit leaves."""

from .run import residual_fact
from .score import Residual

__all__ = ["Residual", "residual_fact"]
