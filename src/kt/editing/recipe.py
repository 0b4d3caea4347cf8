"""Locate-then-edit as a recipe: what is aimed at, where it is written, how the residual spreads.

A *path* takes one target and writes it into one kind of module over a few layers. For each layer, from low to high,
with the layers below already written:

    K = keys of the facts,   R = (wanted value - value now) · spread,   ΔW = solver(R, K, C)        (eq. 6, 7)

and after the solve every ΔW of the path is scaled (eq. 13: 1 - α for the MLP, α for attention).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
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
from .aims import Aim, Objective
from .contexts import Contexts
from .keys import fact_keys, fact_values
from .solvers import LeastSquares, Solution, Solver, System
from .spreads import Spread, even
from .statistics import Statistics
from .values import Targets, find_targets, join_targets

if TYPE_CHECKING:
    from ..model import TracedModel


@dataclass(frozen=True)
class Path:
    """One module kind over some layers, written so that `aim` takes its wanted value."""

    kind: Kind
    layers: tuple[int, ...]
    aim: Aim
    solver: Solver = field(default_factory=LeastSquares)
    scale: float = 1.0
    spread: Spread = even
    mean_value: bool = False  # R-ROME: the value now is the mean over contexts, as the key is

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site(self.kind, layer) for layer in self.layers)


@dataclass(frozen=True)
class Recipe:
    """Paths, the objective that finds their targets, and how the paths know of each other.

    `joint`: one search over all aims (and over `also`, aims that are searched with the others but not written: PMET's
    attention) instead of one an aim. `coupled`: a path sees what the paths before it wrote (scaled); otherwise each is
    solved on the unedited model. `one_by_one`: a whole solve a fact, on the model as the facts before left it (ROME).
    """

    paths: tuple[Path, ...]
    objective: Objective = field(default_factory=Objective)
    joint: bool = False
    also: tuple[Aim, ...] = ()
    coupled: bool = False
    one_by_one: bool = False

    @property
    def live(self) -> list[Path]:
        """The paths that write something."""
        return [p for p in self.paths if p.scale != 0 and p.layers]


History = Mapping[str, Float[Tensor, "d_in d_in"]]
"""By weight name, the sum of k kᵀ over the keys of earlier edits."""


class Written(NamedTuple):
    """One weight's update, scaled, and how it came about."""

    update: LowRank
    condition: float
    keys: Float[Tensor, "d_in fact"]
    residual_norm: float


class Solved(NamedTuple):
    """What a recipe gives: updates by site, targets by aim, and each fact's probability with its δ in place."""

    written: dict[Site, Written]
    targets: dict[Aim, Float[Tensor, "fact d_model"]]
    search: dict[Aim, Targets]


@dataclass(frozen=True)
class Setting:
    """What every solve of a session has in common."""

    model: TracedModel
    statistics: Statistics
    contexts: Contexts
    history: History = field(default_factory=dict)


def solve(setting: Setting, facts: Sequence[Fact], recipe: Recipe, progress: Progress | None = None) -> Solved:
    """Solve a recipe. The model's weights are the same bytes afterwards, also after an exception."""
    if not recipe.one_by_one:
        return _solve_batch(setting, facts, recipe, progress)
    model = setting.model
    parts: list[Solved] = []
    with model.restored(s for p in recipe.live for s in p.sites):
        for done, fact in enumerate(facts, start=1):
            parts.append(_solve_batch(setting, [fact], recipe, None))
            for site, written in parts[-1].written.items():
                model.write(site, written.update)
            if progress:
                progress(done, len(facts))
    return _joined(parts)


def _solve_batch(setting: Setting, facts: Sequence[Fact], recipe: Recipe, progress: Progress | None) -> Solved:
    search = _search(setting, facts, recipe, progress)
    written: dict[Site, Written] = {}
    with ExitStack() as around:
        for path in recipe.live:
            if recipe.coupled:
                around.enter_context(setting.model.restored(path.sites))
            with ExitStack() if recipe.coupled else setting.model.restored(path.sites):
                solved = _walk(setting, facts, path, search[path.aim].wanted[path.aim])
            if recipe.coupled and path.scale != 1:
                for site, result in solved.items():  # from full strength to the path's scale, for the paths after it
                    setting.model.write(site, result.update.scaled(path.scale - 1))
            for site, result in solved.items():
                written[site] = result._replace(update=result.update.scaled(path.scale))
    return Solved(written, {a: t.wanted[a] for a, t in search.items()}, search)


def _search(setting: Setting, facts: Sequence[Fact], recipe: Recipe, progress: Progress | None) -> dict[Aim, Targets]:
    aims = list(dict.fromkeys([p.aim for p in recipe.live] + list(recipe.also)))
    found: dict[Aim, Targets] = {}
    for group in [aims] if recipe.joint else [[a] for a in aims]:
        targets = find_targets(setting.model, facts, group, setting.contexts, recipe.objective, progress=progress)
        found |= dict.fromkeys(group, targets)
    return found


def _walk(
    setting: Setting, facts: Sequence[Fact], path: Path, wanted: Float[Tensor, "fact d_model"]
) -> dict[Site, Written]:
    """Solve and write layer by layer; keys and residuals are read again after each write, as MEMIT does."""
    model, contexts = setting.model, setting.contexts
    bare = Contexts()
    solved: dict[Site, Written] = {}
    for index, site in enumerate(path.sites):
        name = model.weight_name(site)
        share = path.spread(index, len(path.sites))
        if share == 0:
            continue
        keys = fact_keys(model, facts, contexts, site, path.aim.position)
        now = fact_values(model, facts, contexts if path.mean_value else bare, path.aim.site, path.aim.position)
        residuals = wanted.T.double() - now
        system = System(
            (residuals * share).cpu(),
            keys.cpu(),
            fact_keys(model, facts, bare, site, path.aim.position).cpu() if path.solver.needs_bare else None,
            _moment(setting, name, keys) if path.solver.needs_moment else None,
            setting.history.get(name),
        )
        solution = path.solver(system)
        _check(name, solution)
        model.write(site, solution.update)
        solved[site] = Written(solution.update, solution.condition, keys, float(residuals.norm()))
    return solved


def _moment(setting: Setting, name: str, keys: Float[Tensor, "d_in fact"]) -> Float[Tensor, "d_in d_in"]:
    moment = setting.statistics.moment(name).double()
    if moment.shape[0] != keys.shape[0]:
        raise KtError(
            f"the second moment of {name} has size {moment.shape[0]}, its keys {keys.shape[0]}; "
            "take the statistics of this model"
        )
    return moment


def _check(name: str, solution: Solution) -> None:
    if not bool(torch.isfinite(solution.update.left).all() and torch.isfinite(solution.update.right).all()):
        raise WorkFailed(f"the update of {name} is not finite; check targets and statistics")
    if solution.ridge or solution.condition > 1e14:
        warnings.warn(
            f"{name}: the second moment is all but singular (condition number {solution.condition:.0e}, "
            f"ridge {solution.ridge:g}); take it over more tokens or raise mom2_update_weight",
            stacklevel=2,
        )


def _joined(parts: Sequence[Solved]) -> Solved:
    """Solves of one fact after the other as one: updates added up, the rest side by side."""
    written = dict(parts[0].written)
    for part in parts[1:]:
        for site, new in part.written.items():
            old = written[site]
            written[site] = Written(
                old.update.plus(new.update),
                max(old.condition, new.condition),
                torch.cat([old.keys, new.keys], 1),
                (old.residual_norm**2 + new.residual_norm**2) ** 0.5,
            )
    search = {aim: join_targets([p.search[aim] for p in parts]) for aim in parts[0].search}
    return Solved(written, {a: t.wanted[a] for a, t in search.items()}, search)

