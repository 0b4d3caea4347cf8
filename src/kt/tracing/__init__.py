"""Causal tracing and the balance factor: where in the model, and in which module, a fact is recalled."""

from .alpha import Balance, balance_factor
from .means import Curve, RoleGrid
from .prompts import ROLES
from .run import MIN_GAP, causal_trace
from .screen import Screen, screen
from .trace import Trace
from .traced_fact import TracedFact
from .windows import Inflation, peak_inflation

__all__ = [
    "MIN_GAP",
    "ROLES",
    "Balance",
    "Curve",
    "Inflation",
    "RoleGrid",
    "Screen",
    "Trace",
    "TracedFact",
    "balance_factor",
    "causal_trace",
    "peak_inflation",
    "screen",
]
