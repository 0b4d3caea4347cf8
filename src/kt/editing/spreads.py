"""How a path's residual is shared between its layers.

A spread gives the share of the residual *as it is read at that layer* (after the layers below were written), for the
layer at `index` of `count`.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

Spread = Callable[[int, int], float]


def even(index: int, count: int) -> float:
    """1 / (L - l + 1): MEMIT eq. 20, IntAttn-Edit eq. 7."""
    return 1 / (count - index)


def root(index: int, count: int) -> float:
    """1 / sqrt(L - l + 1): PMET, JEEP's low region."""
    return 1 / sqrt(count - index)


def boundary(index: int, count: int) -> float:
    """First and last layer only, half each (BLUE): what is left after the first half goes into the last."""
    if count == 1:
        return 1.0
    return {0: 0.5, count - 1: 1.0}.get(index, 0.0)


def forward(index: int, count: int) -> float:
    """All of what is still missing, at every layer."""
    return 1.0


SPREADS: dict[str, Spread] = {"even": even, "sqrt": root, "boundary": boundary, "forward": forward}
