"""The residual check: how much of the old fact an edit leaves."""

from .run import residual_fact
from .score import Residual

__all__ = ["Residual", "residual_fact"]
