"""Means of traced effects by role and layer: over facts, or over a single fact's noise draws; intervals and tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from ..stats import Interval, IntervalGrid, benjamini_hochberg, bootstrap_mean_grid, sign_flip_test
from .prompts import ROLES, TITLES
from .traced_fact import finite

if TYPE_CHECKING:
    from .trace import Trace


class RoleGrid(NamedTuple):
    """Mean effect by role and layer, over the facts that have a measured cell there.

    `roles` are the roles that occur, `n` the number of facts with a token of the role, `counts` the number measured in
    each cell: `n`, unless cells were left unmeasured (NaN). `p` is of the sign-flip test over facts that the mean is 0,
    `q` the same after Benjamini and Hochberg over all cells of this grid; both are NaN where fewer than two facts have
    the cell.
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


def role_effects(trace: Trace, kind: str, metric: str) -> Float[ndarray, "fact role layer"]:
    """Each fact's mean effect over the measured tokens of each role; NaN where none is measured."""
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


def tested(values: Float[ndarray, "n ..."], grid: IntervalGrid, seed: int = 0) -> Tested:
    """Test whether the means of `grid` differ from zero; NaN where fewer than two records have the cell."""
    p = np.where(grid.n > 1, sign_flip_test(values, seed=seed), np.nan)
    return Tested(p, benjamini_hochberg(p))


def peak(found: Curve) -> tuple[int, Interval]:
    """The layer where the mean is highest, and the mean there with its interval."""
    top = 0 if np.isnan(found.mean).all() else int(np.nanargmax(found.mean))
    return top, Interval(float(found.mean[top]), float(found.low[top]), float(found.high[top]), int(found.counts[top]))


def effects_at(trace: Trace, kind: str, metric: str, at: str) -> Float[ndarray, "record layer"]:
    """What the means at one role are over: facts, or the noise draws of a single one."""
    if trace.n_facts > 1:
        return role_effects(trace, kind, metric)[:, ROLES.index(at)]
    fact = trace.facts[0]
    tokens = [t for t, role in enumerate(fact.roles) if role == at]
    return finite(fact, fact.effects(kind, metric))[:, tokens].mean(1).T


def over(trace: Trace) -> str:
    return "facts" if trace.n_facts > 1 else "noise draws"


def grid(trace: Trace, kind: str, metric: str) -> dict[str, Any]:
    """values, low, high, p, q (row, layer), n, rows and subject_rows: tokens of a single fact, roles of several.

    A single fact's intervals and tests are over its noise draws, several facts' over the facts (see `RoleGrid`); n is
    one number, one by row, or one by cell where some were not measured.
    """
    if trace.n_facts > 1:
        means = trace.by_role(kind, metric)
        subject = [i for i, role in enumerate(means.roles) if role.startswith("subject")]
        return {
            "values": means.mean,
            "low": means.low,
            "high": means.high,
            "p": means.p,
            "q": means.q,
            "n": means.n if (means.counts == means.n[:, None]).all() else means.counts,
            "rows": [TITLES[role] for role in means.roles],
            "subject_rows": subject,
            "row_word": "role",
            "over": over(trace),
        }
    fact = trace.facts[0]
    patched = trace.shown_tokens(fact)
    draws = np.moveaxis(finite(fact, fact.effects(kind, metric))[:, patched], -1, 0)
    cells = bootstrap_mean_grid(draws)
    p, q = tested(draws, cells)
    return {
        "values": cells.mean.T,
        "low": cells.low.T,
        "high": cells.high.T,
        "p": p.T,
        "q": q.T,
        "n": len(draws) if (cells.n == len(draws)).all() else cells.n.T,
        "rows": [fact.tokens[token] for token in patched],
        "subject_rows": [row for row, token in enumerate(patched) if token in range(*fact.span)],
        "row_word": "token",
        "over": over(trace),
    }
