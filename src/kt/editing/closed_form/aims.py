"""Targets: at which site and token a value is searched for, how far it may move, how its residual is spread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from math import sqrt

from ...model.sites import Site
from ...runs import journal


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


Share = float | tuple[float, ...]
"""How much of a path's update is written: one number, or one a fact (then each fact's column is scaled by its own)."""


@dataclass(frozen=True)
class Spread:
    """How a path's wanted change comes to its layers.

    `share`: of the residual *as it is read at that layer* (after the layers below were written), for the layer at
    `index` of `count`; a layer whose share is 0 is not written.

    Which target a layer aims at: that of the path's last layer, unless `own` (each layer one that is searched for at
    its own output, once the layers below are written) or `replay` (one search at the first layer; with its value in
    place one forward, whose stream behind each layer is that layer's target).
    """

    name: str
    about: str
    share: Callable[[int, int], float]
    own: bool = False
    replay: bool = False

    def __call__(self, index: int, count: int) -> float:
        return self.share(index, count)


even = Spread("even", "what is left, over the layers that are left", lambda index, count: 1 / (count - index))
"""1 / (L - l + 1): MEMIT eq. 20, IntAttn-Edit eq. 7."""
root = Spread("sqrt", "the same, by square roots", lambda index, count: 1 / sqrt(count - index))
"""1 / sqrt(L - l + 1): PMET, JEEP's low region."""
ends = Spread(
    "ends",
    "half of one residual at the first and the rest at the last layer",
    lambda index, count: 1.0 if index == count - 1 else 0.5 * (index == 0),
)
"""First and last layer, half each of one residual: what the first half leaves goes into the last. kt's own."""
rest = Spread("rest", "at every layer all that is left of one residual", lambda index, count: 1.0)
"""At every layer all that the layers below left. kt's own."""
blue = Spread(
    "blue",
    "BLUE: the first and the last layer, each to a target of its own",
    lambda index, count: float(index in (0, count - 1)),
    own=True,
)
"""First and last layer, each the whole residual to its own target; the last one's search sees the first's write
(BLUE, arXiv 2502.03748, and its code)."""
replay = Spread(
    "replay",
    "Forward Replay: each layer to what the first one's target makes there",
    lambda index, count: 1.0,
    replay=True,
)
"""Every layer the whole residual to the stream that the first layer's target makes there (Forward Replay of MEMIT-FE,
arXiv 2605.00358, and EasyEdit's code)."""

SPREADS: dict[str, Spread] = {rule.name: rule for rule in (even, root, ends, rest, blue, replay)}
OLD_SPREADS = dict(zip(journal.SPREADS, ((ends, blue), (rest, replay)), strict=True))
"""Names that edit files and runs of older versions have: the rule that each was, and the paper's, which it recalls."""
