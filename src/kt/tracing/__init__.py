"""Causal tracing and the balance factor: where in the model, and in which module, a fact is recalled."""

from .aggregate import Curve, RoleGrid
from .balance import Balance, balance_factor
from .roles import ROLES
from .run import causal_trace
from .settings import MIN_GAP
from .trace import Trace, TracedFact

__all__ = ["MIN_GAP", "ROLES", "Balance", "Curve", "RoleGrid", "Trace", "TracedFact", "balance_factor", "causal_trace"]
