"""Numbers as the page keeps them: short, so that 200 facts stay under 5 MB."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy import ndarray

UNIT = 10_000
"""Effects are kept as whole ten-thousandths."""
COARSE = 1_000
"""Spreads and the probabilities of top tokens as whole thousandths."""


def whole(values: ndarray, unit: int = UNIT) -> Any:
    """Nested lists of ten-thousandths; None where nothing was measured."""
    scaled = np.round(np.asarray(values, dtype=np.float64) * unit)
    return _listed(scaled, lambda value: int(value))


def short(values: Any) -> Any:
    """Four significant digits, nested as given; None for what is not finite. A number that is a text stays one."""
    if values is None or isinstance(values, str):
        return values
    if isinstance(values, tuple | list):
        return [short(value) for value in values]
    if isinstance(values, ndarray):
        return _listed(np.asarray(values, dtype=np.float64), lambda value: float(f"{value:.4g}"))
    return float(f"{float(values):.4g}") if np.isfinite(values) else None


def _listed(values: ndarray, make: Any) -> Any:
    if values.ndim == 0:
        return make(values) if np.isfinite(values) else None
    return [_listed(row, make) for row in values]
