"""Causal tracing and the balance factor: where in the model, and in which module, a fact is recalled."""

from .aggregate import Curve, RoleGrid
from .balance import Balance, balance_factor
from .roles import ROLES
from .run import causal_trace
from .screen import Screen, screen
from .settings import MIN_GAP
from .trace import Trace, TracedFact
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
