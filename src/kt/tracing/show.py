"""Figures and short summaries of traces and balances; what they draw is computed in aggregate.py and balance.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from .._util.text import html_table
from ..errors import BadFact
from ..stats import Interval, bootstrap_mean_grid
from .prompts import ROLES, TITLES
from .trace import finite, role_effects, tested

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from .alpha import Balance
    from .trace import Trace


METRIC_TITLES = {"prob": "probability restored", "logit_diff": "logit difference restored (eq. 8)"}
NOISE_TITLES = {"prob": "probability taken away", "logit_diff": "logit difference taken away"}
KIND_TITLES = {"mlp": "MLP", "attn": "Attention", "hidden": "Hidden state"}
MODULES = ("mlp", "attn")


def heatmap(trace: Trace, kind: str, metric: str) -> go.Figure:
    """See `Trace.heatmap`."""
    from ..figures import heatmap_panel

    return heatmap_panel([_panel(trace, kind, metric)], title=_title(trace), subtitle=_subtitle(trace))


def heatmaps(trace: Trace, metric: str) -> go.Figure:
    """See `Trace.heatmaps`. Single heads have a figure of their own, unless the trace holds nothing else."""
    from ..figures import heatmap_panel

    kinds = without_heads(trace)
    if not kinds:
        return heads(trace, metric)
    panels = [_panel(trace, trace.checked(kind, metric), metric) for kind in kinds]
    # Restored hidden states reach 1 and would leave the two modules pale: each sort shares a scale of its own.
    for sort in (True, False):
        alike = [p for p in panels if (p["kind"] in MODULES) is sort]
        top = max((float(p["values"][~np.isnan(p["values"])].max(initial=0.0)) for p in alike), default=0.0)
        for panel in alike if top > 0 else ():
            panel["zmax"] = top
    return heatmap_panel(panels, title=_title(trace), subtitle=_subtitle(trace), shared_scale=False)


def curves(trace: Trace, at: str) -> go.Figure:
    """See `Trace.curves`. Single heads are left out, unless the trace holds nothing else."""
    from ..figures import Series, layer_curves, theme

    layers = range(trace.n_layers)
    series: dict[str, dict[str, Any]] = {}
    for name in without_heads(trace) or trace.kinds:
        series[name] = {}
        for metric in trace.metrics:
            found = trace.curve(name, metric, at)
            line = (found.mean, found.low, found.high, found.counts)
            series[name][metric] = Series(theme.look(name).label, layers, *line, kind=name)
    title = f"{_title(trace)} · {TITLES[at].lower()}"
    titles = {metric: _metric_title(trace, metric) for metric in trace.metrics}
    return layer_curves(series, title=title, subtitle=_subtitle(trace), metric_titles=titles)


def heads(trace: Trace, metric: str = "logit_diff", at: str = "subject_last") -> go.Figure:
    """Attention by head: heads down, layers across, at one role. q is over all cells of the figure.

    Several facts' intervals and tests are over the facts, a single fact's over its noise draws.

    Raises:
        BadFact: the trace holds no single heads, or no token of this role.
    """
    from ..figures import heads_figure
    from ..figures.theme import head_of

    found = {head: kind for kind in trace.kinds if (head := head_of(kind)) is not None}
    if not found:
        raise BadFact("this trace holds no single heads; trace again with kinds=('heads',)")
    if at not in {role for fact in trace.facts for role in fact.roles}:
        raise BadFact(f"no traced fact has a token of role {at!r}; choose among {', '.join(ROLES)}")
    numbers = sorted(found)
    records = np.stack([_records(trace, trace.checked(found[h], metric), metric, at) for h in numbers], -1)
    cells = bootstrap_mean_grid(records)
    p, q = tested(records, cells)
    return heads_figure(
        cells.mean,
        cells.low,
        cells.high,
        q,
        p=p,
        n=cells.n,
        heads=numbers,
        over=_over(trace),
        colour_title=_metric_title(trace, metric),
        title=f"{_title(trace)} · attention by head · {TITLES[at].lower()}",
        subtitle=_subtitle(trace),
    )


def without_heads(trace: Trace) -> list[str]:
    """The kinds that are whole modules or states."""
    from ..figures.theme import head_of

    return [kind for kind in trace.kinds if head_of(kind) is None]


def _records(trace: Trace, kind: str, metric: str, at: str) -> Float[ndarray, "record layer"]:
    """What the means at one role are over: facts, or the noise draws of a single one."""
    if trace.n_facts > 1:
        return role_effects(trace, kind, metric)[:, ROLES.index(at)]
    fact = trace.facts[0]
    tokens = [t for t, role in enumerate(fact.roles) if role == at]
    return finite(fact, fact.effects(kind, metric))[:, tokens].mean(1).T


def _over(trace: Trace) -> str:
    return "facts" if trace.n_facts > 1 else "noise draws"


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
            "over": _over(trace),
        }
    fact = trace.facts[0]
    draws = np.moveaxis(finite(fact, fact.effects(kind, metric)), -1, 0)
    cells = bootstrap_mean_grid(draws)
    p, q = tested(draws, cells)
    return {
        "values": cells.mean.T,
        "low": cells.low.T,
        "high": cells.high.T,
        "p": p.T,
        "q": q.T,
        "n": len(draws) if (cells.n == len(draws)).all() else cells.n.T,
        "rows": list(fact.tokens),
        "subject_rows": list(range(*fact.span)),
        "row_word": "token",
        "over": _over(trace),
    }


def _panel(trace: Trace, kind: str, metric: str) -> dict[str, Any]:
    return {"kind": kind, "colour_title": _metric_title(trace, metric), **grid(trace, kind, metric)}


def _metric_title(trace: Trace, metric: str) -> str:
    """Denoising restores what noising takes away; see trace.py."""
    return (NOISE_TITLES if trace.metadata.get("direction") == "noise" else METRIC_TITLES)[metric]


def _title(trace: Trace) -> str:
    if trace.n_facts == 1:
        return f"{trace.facts[0].prompt} → {trace.facts[0].answer}"
    return f"Causal tracing of {trace.n_facts} facts"


def _subtitle(trace: Trace) -> str:
    window = int(trace.metadata["window"])
    parts = [str(trace.metadata["model"]), f"window of {window} layers" if window > 1 else "single layers"]
    parts += ["corrupted states in the clean run"] * (trace.metadata.get("direction") == "noise")
    parts += ["estimated by attribution patching"] * (trace.metadata.get("method") == "atp")
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
        if np.isnan(curve.mean).all():
            lines.append((kind, "not measured", ""))
            continue
        peak = int(np.nanargmax(curve.mean))
        lines.append((kind, str(peak), f"{curve.mean[peak]:.3f}"))
    head = f"Trace of {counted(trace.n_facts)} in {trace.metadata['model']}; {trace.why_left_out()}"
    return html_table(head, ("kind", f"peak layer at {TITLES[ROLES[2]].lower()}", "LD there"), lines)


def balance_html(balance: Balance) -> str:
    """A small table for notebooks."""
    lines = [
        (name, f"{sum(values):.3f}", ", ".join(map(str, balance.layers[name])) or "none")
        for name, values in balance.per_layer.items()
    ]
    return html_table(repr(balance), ("module", "sum of LD over layers", "proposed layers"), lines)
