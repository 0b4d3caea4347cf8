"""Means of effects over facts: by token role and layer, with bootstrap intervals and sign-flip tests over facts.

A cell of a fact may be NaN: not measured. Means, intervals and tests are over the facts that have the cell, and
`counts` says how many these are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from ..errors import BadFact, WorkFailed
from ..significance import benjamini_hochberg, sign_flip_test
from ..stats import IntervalGrid, bootstrap_mean_grid
from .roles import ROLES

if TYPE_CHECKING:
    import pandas as pd

    from .trace import Trace, TracedFact


class RoleGrid(NamedTuple):
    """Mean effect by role and layer; `roles` are those that occur, `n` the facts that have one.

    `p` is of the sign-flip test over facts that the mean is 0, `q` the same after Benjamini and Hochberg over all cells
    of this grid; both are NaN where fewer than two facts have the cell. `counts` are the facts measured in each cell:
    `n`, unless cells were left unmeasured.
    """

    roles: tuple[str, ...]
    mean: Float[ndarray, "role layer"]
    low: Float[ndarray, "role layer"]
    high: Float[ndarray, "role layer"]
    n: Int[ndarray, " role"]
    p: Float[ndarray, "role layer"]
    q: Float[ndarray, "role layer"]
    counts: Int[ndarray, "role layer"]


class Curve(NamedTuple):
    """Mean effect by layer at one role: a row of `RoleGrid`. With one fact `low`, `high`, `p` and `q` are NaN."""

    mean: Float[ndarray, " layer"]
    low: Float[ndarray, " layer"]
    high: Float[ndarray, " layer"]
    n: int
    p: Float[ndarray, " layer"]
    q: Float[ndarray, " layer"]
    counts: Int[ndarray, " layer"]


class Tested(NamedTuple):
    """Sign-flip p of every cell and q over all of them."""

    p: Float[ndarray, "*cell"]
    q: Float[ndarray, "*cell"]


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
                        "kind": np.full(layers.size, kind, dtype=object),
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


def role_effects(trace: Trace, kind: str, metric: str) -> Float[ndarray, "fact role layer"]:
    """Each fact's mean over the measured tokens of each role; NaN where there is none."""
    effects = np.full((trace.n_facts, len(ROLES), trace.n_layers), np.nan)
    for i, fact in enumerate(trace.facts):
        effect = finite(fact, fact.effect(kind, metric))
        measured = ~np.isnan(effect)
        for r, role in enumerate(ROLES):
            tokens = [t for t, has in enumerate(fact.roles) if has == role]
            n = measured[:, tokens].sum(1)
            total = np.where(measured, effect, 0.0)[:, tokens].sum(1)
            np.divide(total, n, out=effects[i, r], where=n > 0)
    return effects


def by_role(trace: Trace, kind: str, metric: str, n_boot: int = 2000, seed: int = 0) -> RoleGrid:
    """See `Trace.by_role`."""
    effects = role_effects(trace, kind, metric)
    # A role counts as there by its tokens, not by its cells: those may all be unmeasured.
    has = np.array([[role in fact.roles for role in ROLES] for fact in trace.facts]).sum(0)
    there = np.flatnonzero(has)
    grid = bootstrap_mean_grid(effects[:, there], n_boot, seed)
    p, q = tested(effects[:, there], grid, seed)
    return RoleGrid(tuple(ROLES[r] for r in there), grid.mean, grid.low, grid.high, has[there], p, q, grid.n)


def tested(values: Float[ndarray, "n ..."], grid: IntervalGrid, seed: int = 0) -> Tested:
    """Whether the means of `grid` are told apart from zero; NaN where fewer than two records have the cell."""
    p = np.where(grid.n > 1, sign_flip_test(values, seed=seed), np.nan)
    return Tested(p, benjamini_hochberg(p))


def curve(trace: Trace, kind: str, metric: str, at: str = "subject_last", n_boot: int = 2000, seed: int = 0) -> Curve:
    """See `Trace.curve`."""
    grid = by_role(trace, kind, metric, n_boot, seed)
    if at not in grid.roles:
        raise BadFact(f"no traced fact has a token of role {at!r}; choose among {', '.join(grid.roles)}")
    row = grid.roles.index(at)
    means = (grid.mean[row], grid.low[row], grid.high[row])
    return Curve(*means, int(grid.n[row]), grid.p[row], grid.q[row], grid.counts[row])


def finite(fact: TracedFact, values: ndarray) -> ndarray:
    """The values, once none of them is infinite; NaN means not measured."""
    if np.isinf(values).any():
        raise WorkFailed(f"{fact.prompt!r} has effects that are infinite; trace it again")
    return values
