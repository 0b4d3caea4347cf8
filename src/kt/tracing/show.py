"""Figures and short summaries of traces and balances; what they draw is computed in aggregate.py and balance.py."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..sites import Kind
from ..stats import Interval, bootstrap_mean_grid
from .aggregate import finite
from .roles import ROLES, TITLES

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from .balance import Balance
    from .trace import Trace

METRIC_TITLES = {"prob": "probability restored", "logit_diff": "logit difference restored (eq. 8)"}
KIND_TITLES = {"mlp": "MLP", "attn": "Attention", "hidden": "Hidden state"}


def heatmap(trace: Trace, kind: Kind, metric: str) -> go.Figure:
    """See `Trace.heatmap`."""
    from ..figures import heatmap_panel

    return heatmap_panel([_panel(trace, kind, metric)], title=_title(trace), subtitle=_subtitle(trace))


def heatmaps(trace: Trace, metric: str) -> go.Figure:
    """See `Trace.heatmaps`."""
    from ..figures import heatmap_panel

    panels = [_panel(trace, trace.checked(kind, metric), metric) for kind in trace.kinds]
    modules = [p for p in panels if p["kind"] != Kind.RESID]
    top = max((float(p["values"].max()) for p in modules), default=0.0)
    if top > 0:
        # Restored hidden states reach 1 and would leave the two modules pale: these share a scale of their own.
        for panel in modules:
            panel["zmax"] = top
    return heatmap_panel(panels, title=_title(trace), subtitle=_subtitle(trace), shared_scale=False)


def curves(trace: Trace, at: str) -> go.Figure:
    """See `Trace.curves`."""
    from ..figures import Series, layer_curves

    layers = range(trace.n_layers)
    series: dict[str, dict[str, Any]] = {}
    for name in map(str, trace.kinds):
        series[name] = {}
        for metric in trace.metrics:
            found = trace.curve(name, metric, at)
            line = (found.mean, found.low, found.high, found.n)
            series[name][metric] = Series(KIND_TITLES[name], layers, *line, kind=name)
    title = f"{_title(trace)} · {TITLES[at].lower()}"
    return layer_curves(series, title=title, subtitle=_subtitle(trace), metric_titles=METRIC_TITLES)


def balance_figure(balance: Balance) -> go.Figure:
    """See `Balance.figure`."""
    from ..figures import Series
    from ..figures import balance_figure as draw

    series = {}
    for name, mean in balance.per_layer.items():
        pairs = balance.per_layer_ci95[name] or ((np.nan, np.nan),) * len(mean)
        low, high = np.array(pairs).T
        series[name] = Series(KIND_TITLES[name], range(len(mean)), np.array(mean), low, high, balance.n_facts, name)
    alpha = Interval(balance.alpha, *(balance.ci95 or (np.nan, np.nan)), balance.n_facts)
    return draw(
        series,
        alpha,
        title=f"Balance factor of {balance.run['model']}",
        subtitle=f"Last subject token, {counted(balance.n_facts)}",
        layers=balance.layers,
        y_title=METRIC_TITLES[balance.metric],
    )


def grid(trace: Trace, kind: Kind, metric: str) -> dict[str, Any]:
    """values, low, high (row, layer), n, rows and subject_rows: tokens of a single fact, roles of several.

    A single fact's intervals are over its noise draws, several facts' over the facts.
    """
    if trace.n_facts > 1:
        means = trace.by_role(kind, metric)
        subject = [i for i, role in enumerate(means.roles) if role.startswith("subject")]
        rows = [TITLES[role] for role in means.roles]
        return {
            "values": means.mean,
            "low": means.low,
            "high": means.high,
            "n": means.n,
            "rows": rows,
            "subject_rows": subject,
            "row_word": "role",
        }
    fact = trace.facts[0]
    draws = finite(fact, fact.effects(kind, metric))
    cells = bootstrap_mean_grid(np.moveaxis(draws, -1, 0))
    return {
        "values": cells.mean.T,
        "low": cells.low.T,
        "high": cells.high.T,
        "n": draws.shape[-1],
        "rows": list(fact.tokens),
        "subject_rows": list(range(*fact.span)),
        "row_word": "token",
    }


def _panel(trace: Trace, kind: Kind, metric: str) -> dict[str, Any]:
    return {"kind": str(kind.value), "colour_title": METRIC_TITLES[metric], **grid(trace, kind, metric)}


def _title(trace: Trace) -> str:
    if trace.n_facts == 1:
        return f"{trace.facts[0].prompt} → {trace.facts[0].answer}"
    return f"Causal tracing of {trace.n_facts} facts"


def _subtitle(trace: Trace) -> str:
    window = int(trace.metadata["window"])
    parts = [str(trace.metadata["model"]), f"window of {window} layers" if window > 1 else "single layers"]
    if trace.n_facts == 1:
        fact = trace.facts[0]
        parts.append(f"foil {fact.foil} ({fact.foil_source})")
    clean, corrupt = (np.mean([getattr(f, name) for f in trace.facts]) for name in ("p_clean", "p_corrupt"))
    return " · ".join([*parts, f"p(r) {clean:.2f} clean, {corrupt:.2f} corrupted"])


def counted(n: int) -> str:
    """`1 fact`, `2 facts`."""
    return f"{n} fact{'s' * (n != 1)}"


def summary_html(trace: Trace) -> str:
    """A small table for notebooks: the strongest layer at the last subject token by kind."""
    lines = []
    for kind in trace.kinds:
        curve = trace.curve(kind, "logit_diff", n_boot=200)
        peak = int(curve.mean.argmax())
        lines.append((str(kind), str(peak), f"{curve.mean[peak]:.3f}"))
    head = f"Trace of {counted(trace.n_facts)} in {trace.metadata['model']}; {trace.why_left_out()}"
    return _table(head, ("kind", f"peak layer at {TITLES[ROLES[2]].lower()}", "LD there"), lines)


def balance_html(balance: Balance) -> str:
    """A small table for notebooks."""
    lines = [
        (name, f"{sum(values):.3f}", ", ".join(map(str, balance.layers[name])) or "none")
        for name, values in balance.per_layer.items()
    ]
    return _table(repr(balance), ("module", "sum of LD over layers", "proposed layers"), lines)


def _table(caption: str, head: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> str:
    cells = lambda tag, row: "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)  # noqa: E731
    body = "".join(f"<tr>{cells('td', line)}</tr>" for line in lines)
    return f"<table><caption>{html.escape(caption)}</caption><tr>{cells('th', head)}</tr>{body}</table>"
