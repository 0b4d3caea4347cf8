"""Locate-then-edit as a recipe: what is aimed at, where it is written, how the residual spreads.

A *path* takes one target and writes it into one kind of module over a few layers. For each layer, from low to high,
with the layers below already written:

    K = keys of the facts,   R = (wanted value - value now) · spread,   ΔW = R Kᵀ (λC + K Kᵀ)⁻¹        (eq. 6, 7)

and after the solve every ΔW of the path is scaled (eq. 13: 1 - α for the MLP, α for attention).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import KtError, WorkFailed
from ..facts.fact import Fact
from ..progress import Progress
from ..sites import Kind, LowRank, Site
from .contexts import Contexts
from .keys import Position, fact_keys, fact_values
from .solvers import Solution, least_squares
from .statistics import Statistics
from .values import Objective, Targets, find_targets

if TYPE_CHECKING:
    from ..model import TracedModel

Spread = Callable[[int], float]
"""Share of the residual that a layer takes when it and `remaining - 1` layers above it are still to be written."""


def even(remaining: int) -> float:
    """1 / (L - l + 1), eq. 7."""
    return 1 / remaining


@dataclass(frozen=True)
class Path:
    """One module kind over some layers, written so that `aim` takes its wanted value."""

    kind: Kind
    layers: tuple[int, ...]
    aim: Site
    scale: float = 1.0
    weight: float = 15000.0  # λ, mom2_update_weight
    spread: Spread = even
    position: Position = Position.SUBJECT_LAST

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site(self.kind, layer) for layer in self.layers)


@dataclass(frozen=True)
class Recipe:
    """Paths, the objective that finds their targets, and how the paths know of each other.

    `joint`: one search over all aims instead of one an aim. `coupled`: a path sees what the paths before it wrote
    (scaled); otherwise each is solved on the unedited model.
    """

    paths: tuple[Path, ...]
    objective: Objective = field(default_factory=Objective)
    joint: bool = False
    coupled: bool = False


class Written(NamedTuple):
    """One weight's update, scaled, and how it came about."""

    update: LowRank
    condition: float
    keys: Float[Tensor, "d_in fact"]
    residual_norm: float


class Solved(NamedTuple):
    """What a recipe gives: updates by site, targets by aim, and the search's outcome by aim."""

    written: dict[Site, Written]
    targets: dict[Site, Float[Tensor, "fact d_model"]]
    search: dict[Site, Targets]


def solve(
    model: TracedModel,
    facts: Sequence[Fact],
    recipe: Recipe,
    statistics: Statistics,
    contexts: Contexts,
    progress: Progress | None = None,
) -> Solved:
    """Solve a recipe. The model's weights are the same bytes afterwards, also after an exception."""
    paths = [p for p in recipe.paths if p.scale != 0 and p.layers]
    search = _search(model, facts, paths, recipe, contexts, progress)
    written: dict[Site, Written] = {}
    with ExitStack() as around:
        for path in paths:
            if recipe.coupled:
                around.enter_context(model.restored(path.sites))
            with ExitStack() if recipe.coupled else model.restored(path.sites):
                solved = _walk(model, facts, path, search[path.aim].wanted[path.aim], statistics, contexts)
            if recipe.coupled:
                _rewrite_scaled(model, path, solved)
            for site, result in solved.items():
                written[site] = result._replace(update=result.update.scaled(path.scale))
    return Solved(written, {a: t.wanted[a] for a, t in search.items()}, search)


def _search(
    model: TracedModel,
    facts: Sequence[Fact],
    paths: Sequence[Path],
    recipe: Recipe,
    contexts: Contexts,
    progress: Progress | None,
) -> dict[Site, Targets]:
    aims = list(dict.fromkeys((p.aim, p.position) for p in paths))
    groups = [aims] if recipe.joint else [[a] for a in aims]
    found: dict[Site, Targets] = {}
    for group in groups:
        sites = [site for site, _ in group]
        targets = find_targets(model, facts, sites, contexts, recipe.objective, group[0][1], progress=progress)
        found |= dict.fromkeys(sites, targets)
    return found


def _walk(
    model: TracedModel,
    facts: Sequence[Fact],
    path: Path,
    wanted: Float[Tensor, "fact d_model"],
    statistics: Statistics,
    contexts: Contexts,
) -> dict[Site, Written]:
    """Solve and write layer by layer; keys and residuals are read again after each write, as MEMIT does."""
    solved: dict[Site, Written] = {}
    for done, site in enumerate(path.sites):
        keys = fact_keys(model, facts, contexts, site, path.position)
        now = fact_values(model, facts, path.aim, path.position)
        residuals = wanted.T.double() - now
        moment = statistics.moment(model.weight_name(site))
        if moment.shape[0] != keys.shape[0]:
            raise KtError(
                f"the second moment of {model.weight_name(site)} has size {moment.shape[0]}, its keys {keys.shape[0]}; "
                "take the statistics of this model"
            )
        share = path.spread(len(path.layers) - done)
        solution: Solution = least_squares(residuals * share, keys, moment, path.weight)
        if not bool(torch.isfinite(solution.update.left).all() and torch.isfinite(solution.update.right).all()):
            raise WorkFailed(f"the update of {model.weight_name(site)} is not finite; check targets and statistics")
        if solution.ridge or solution.condition > 1e14:
            warnings.warn(
                f"{model.weight_name(site)}: the second moment is all but singular (condition number "
                f"{solution.condition:.0e}, ridge {solution.ridge:g}); take it over more tokens or raise mom2_update_weight",
                stacklevel=2,
            )
        model.write(site, solution.update)
        solved[site] = Written(solution.update, solution.condition, keys, float(residuals.norm()))
    return solved


def _rewrite_scaled(model: TracedModel, path: Path, solved: dict[Site, Written]) -> None:
    """Take the path from full strength to its scale, for the paths that come after it."""
    for site, result in solved.items():
        model.write(site, result.update.scaled(path.scale - 1))
