"""Means of effects over facts: by token role and layer, with bootstrap intervals over facts."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from ..errors import BadFact, WorkFailed
from ..sites import Kind
from ..stats import bootstrap_mean_grid
from .roles import ROLES

if TYPE_CHECKING:
    import pandas as pd

    from .trace import Trace, TracedFact


class RoleGrid(NamedTuple):
    """Mean effect by role and layer; `roles` are those that occur, `n` the facts that have one."""

    roles: tuple[str, ...]
    mean: Float[ndarray, "role layer"]
    low: Float[ndarray, "role layer"]
    high: Float[ndarray, "role layer"]
    n: Int[ndarray, " role"]


class Curve(NamedTuple):
    """Mean effect by layer at one role. With one fact there is no interval: `low` and `high` are NaN."""

    mean: Float[ndarray, " layer"]
    low: Float[ndarray, " layer"]
    high: Float[ndarray, " layer"]
    n: int


def to_dataframe(trace: Trace) -> pd.DataFrame:
    """See `Trace.to_dataframe`."""
    import pandas as pd

    parts = []
    for fact in trace.facts:
        layers, tokens = np.meshgrid(np.arange(trace.n_layers), np.arange(len(fact.tokens)), indexing="ij")
        for kind in trace.kinds:
            for metric in trace.metrics:
                parts.append(
                    {
                        "fact": np.full(layers.size, fact.index),
                        "kind": np.full(layers.size, str(kind), dtype=object),
                        "layer": layers.ravel(),
                        "token": tokens.ravel(),
                        "role": np.array(fact.roles, dtype=object)[tokens.ravel()],
                        "metric": np.full(layers.size, metric, dtype=object),
                        "value": finite(fact, fact.effect(kind, metric)).ravel(),
                        "clean": np.full(layers.size, fact.clean[metric]),
                        "corrupted": np.full(layers.size, fact.corrupted[metric].mean(dtype=np.float64)),
                    }
                )
    return pd.DataFrame({name: np.concatenate([p[name] for p in parts]) for name in parts[0]})


def role_effects(trace: Trace, kind: Kind, metric: str) -> Float[ndarray, "fact role layer"]:
    """Each fact's mean over the tokens of each role; NaN where it has no such token."""
    effects = np.full((trace.n_facts, len(ROLES), trace.n_layers), np.nan)
    for i, fact in enumerate(trace.facts):
        effect = finite(fact, fact.effect(kind, metric))
        for r, role in enumerate(ROLES):
            tokens = [t for t, has in enumerate(fact.roles) if has == role]
            if tokens:
                effects[i, r] = effect[:, tokens].mean(1)
    return effects


def by_role(trace: Trace, kind: Kind, metric: str, n_boot: int = 2000, seed: int = 0) -> RoleGrid:
    """See `Trace.by_role`."""
    grid = bootstrap_mean_grid(role_effects(trace, kind, metric), n_boot, seed)
    there = np.flatnonzero(grid.n[:, 0])
    roles = tuple(ROLES[r] for r in there)
    return RoleGrid(roles, grid.mean[there], grid.low[there], grid.high[there], grid.n[there, 0])


def curve(trace: Trace, kind: Kind, metric: str, at: str = "subject_last", n_boot: int = 2000, seed: int = 0) -> Curve:
    """See `Trace.curve`."""
    grid = by_role(trace, kind, metric, n_boot, seed)
    if at not in grid.roles:
        raise BadFact(f"no traced fact has a token of role {at!r}; choose among {', '.join(grid.roles)}")
    row = grid.roles.index(at)
    return Curve(grid.mean[row], grid.low[row], grid.high[row], int(grid.n[row]))


def finite(fact: TracedFact, values: ndarray) -> ndarray:
    """The values, once none of them hides a NaN from a mean."""
    if not np.isfinite(values).all():
        raise WorkFailed(f"{fact.prompt!r} has effects that are not finite; trace it again")
    return values
