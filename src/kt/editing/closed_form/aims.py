"""Targets: at which site and token a value is searched for, how far it may move, how its residual is spread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from math import sqrt

from ...model.sites import Site


class Position(str, Enum):
    """Where a fact is read and written (`fact_token`)."""

    SUBJECT_LAST = "subject_last"
    PROMPT_LAST = "last"


@dataclass(frozen=True)
class TargetSite:
    """One δ: the value at `site` and `position`. JEEP bounds and decays its two regions apart; None takes the
    objective's own.

    `below`: how the search stands in for a write of several modules' own outputs, by layer the share of δ that is added
    to the same kind of output; at `site` itself the value is then set, as the write will set it, whatever the layers
    below make of their shares. None: δ is added at `site` alone.
    """

    site: Site
    position: Position = Position.SUBJECT_LAST
    clamp: float | None = None
    decay: float | None = None
    below: tuple[tuple[int, float], ...] | None = None

    def share_at(self, site: Site) -> float:
        """The share of δ that the search adds to a site's value."""
        if site == self.site:
            return 1.0
        lower = site.kind is self.site.kind and site.role == self.site.role
        return dict(self.below or ()).get(site.layer, 0.0) if lower else 0.0

    @property
    def lowest_layer(self) -> int:
        return min([self.site.layer, *(layer for layer, _ in self.below or ())])

    def __str__(self) -> str:
        return str(self.site) if self.position is Position.SUBJECT_LAST else f"{self.site}@{self.position.value}"


# How a path's residual is shared between its layers.
#
# A spread gives the share of the residual *as it is read at that layer* (after the layers below were written), for the
# layer at `index` of `count`.

Spread = Callable[[int, int], float]
Share = float | tuple[float, ...]
"""How much of a path's update is written: one number, or one a fact (then each fact's column is scaled by its own)."""


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
