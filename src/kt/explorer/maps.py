"""Maps of a trace: effects by token and layer of every fact, their means over facts by role, and heads by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy import ndarray

from .._util.text import visible
from ..errors import WorkFailed
from ..figures.theme import head_of, look
from ..stats import bootstrap_mean_grid
from ..tracing import Trace, TracedFact
from ..tracing.means import grid, role_effects, tested
from ..tracing.prompts import ROLES
from ..tracing.titles import metric_title
from ..tracing.trace import without_heads
from .numbers import COARSE, short, whole
from .rows import Rows

HEADS_AT = ("subject_last", "last")
"""The tokens at which single heads are shown: all tokens of all heads would fill the page."""


def trace_map(trace: Trace, name: str, rows: Rows) -> dict[str, Any]:
    """A trace for the page: by fact (the place of its row) and as means; `name` tells it from others."""
    heads = {head: kind for kind in trace.kinds if (head := head_of(kind)) is not None}
    kinds = without_heads(trace)
    several = trace.n_facts > 1
    return {
        "name": visible(name),
        "model": visible(str(trace.metadata["model"])),
        "layers": trace.n_layers,
        "kinds": {kind: look(kind).label for kind in kinds} | ({"heads": "Heads"} if heads else {}),
        "metrics": {metric: metric_title(trace, metric) for metric in trace.metrics},
        "direction": trace.metadata["direction"],
        "method": trace.metadata["method"],
        "draws": max((len(fact.corrupted["prob"]) for fact in trace.facts), default=0),
        "n": trace.n_facts,
        "facts": {rows.index(fact): _fact(trace, fact, kinds, heads) for fact in trace.facts},
        "mean": _means(trace, kinds, heads) if several else None,
    }


def _fact(trace: Trace, fact: TracedFact, kinds: Sequence[str], heads: dict[int, str]) -> dict[str, Any]:
    """One fact's effects, mean and standard deviation over the noise draws."""
    shown = trace.shown_tokens(fact)
    cells: dict[str, Any] = {}
    for kind in kinds:
        cells[kind] = {}
        for metric in trace.metrics:
            effects = _effects(fact, kind, metric)
            if effects is not None:
                values = effects[:, shown].transpose(1, 0, 2)
                cells[kind][metric] = _cells(values.mean(-1))
                if values.shape[-1] > 1:
                    cells[kind][metric]["sd"] = whole(values.std(-1), COARSE)
    if heads:
        cells["heads"] = {metric: found for metric in trace.metrics if (found := _heads(fact, heads, metric))}
    return {
        "rows": [visible(fact.tokens[token]) for token in shown],
        "tokens": None if shown == list(range(len(shown))) else shown,
        "hidden": len(trace.patched_tokens(fact)) - len(shown),
        "subject": [row for row, token in enumerate(shown) if token in range(*fact.span)],
        "foil": visible(fact.foil),
        "clean": short(fact.p_clean),
        "corrupted": short(fact.p_corrupt),
        "cells": cells,
    }


def _effects(fact: TracedFact, kind: str, metric: str) -> ndarray | None:
    """None where eq. 8 has no value."""
    try:
        return fact.effects(kind, metric)
    except WorkFailed:
        return None


def _cells(mean: ndarray, **more: ndarray | None) -> dict[str, Any]:
    return {"v": whole(mean), **{name: whole(values) for name, values in more.items() if values is not None}}


def _heads(fact: TracedFact, heads: dict[int, str], metric: str) -> dict[str, Any]:
    """Heads down, at the subject's last token and at the last one."""
    tokens = {role: fact.roles.index(role) for role in HEADS_AT if role in fact.roles}
    found: dict[str, Any] = {}
    for role, token in tokens.items():
        parts = [_effects(fact, heads[head], metric) for head in sorted(heads)]
        if all(part is not None and np.isfinite(part[:, token]).any() for part in parts):
            found[role] = _cells(np.stack([part[:, token].mean(-1) for part in parts if part is not None]))
    return found


def _means(trace: Trace, kinds: Sequence[str], heads: dict[int, str]) -> dict[str, Any]:
    """Means over facts by role, with 95% intervals, q and n; the same for heads at two roles."""
    cells: dict[str, Any] = {}
    labels: dict[str, Any] = {"rows": [], "subject": []}
    for kind in kinds:
        cells[kind] = {}
        for metric in trace.metrics:
            found = grid(trace, kind, metric)
            labels = {"rows": found["rows"], "subject": found["subject_rows"]}
            n = np.asarray(found["n"])
            n = np.broadcast_to(n if n.ndim == 2 else n.reshape(-1, 1), found["values"].shape)
            cells[kind][metric] = _interval_cells(found["values"], found["low"], found["high"], found["q"], n)
    if heads:
        cells["heads"] = {metric: _mean_heads(trace, heads, metric) for metric in trace.metrics}
    clean, corrupted = (np.mean([getattr(f, name) for f in trace.facts]) for name in ("p_clean", "p_corrupt"))
    return {**labels, "clean": short(clean), "corrupted": short(corrupted), "cells": cells}


def _interval_cells(mean: ndarray, low: ndarray, high: ndarray, q: ndarray, n: ndarray) -> dict[str, Any]:
    return {**_cells(mean, low=low, high=high), "q": short(q), "n": n.tolist()}


def _mean_heads(trace: Trace, heads: dict[int, str], metric: str) -> dict[str, Any]:
    found = {}
    values = np.stack([role_effects(trace, heads[head], metric) for head in sorted(heads)], 2)
    for role in HEADS_AT:
        at = values[:, ROLES.index(role)]
        if np.isfinite(at).any():
            cells = bootstrap_mean_grid(at)
            found[role] = _interval_cells(cells.mean, cells.low, cells.high, tested(at, cells).q, cells.n)
    return found
