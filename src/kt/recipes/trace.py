"""Recipes of causal tracing: heatmaps and curves of MLP and attention (IntAttn-Edit and its supplement, Figures 1, 2).

One trace a model gives both figures. It is not kept on the way: an interrupted run is begun again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._util.text import count, interval
from ..errors import BadFile, KtError
from ..report import Table
from ..runs.folder import FILES
from . import trace_checks
from .base import How, Keys, Kind
from .claims import peak_layer, peak_words, read_claims
from .figure import DATA, FigureRecipe, FigureRun, View, figure_facts, figure_run, most_of
from .values import number, refuse, text, texts, whole

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from .._util.progress import Progress
    from ..model.model import TracedModel
    from ..tracing import Trace


SMOKE_FACTS, SMOKE_SAMPLES = 6, 2
METRICS = ("logit_diff", "prob")


def _scale(where: Path | str, key: str, value: Any) -> float:
    """The noise's size: it must be some."""
    found = number(where, key, value, 0)
    return found if found else refuse(where, key, value, "a number above 0 (3 is usual)")


READERS: Mapping[str, Callable[[Path, str, Any], Any]] = {
    "kinds": texts,
    "samples": partial(whole, least=1),
    "noise_scale": _scale,
    "window": partial(whole, least=1),
    "corrupt": partial(text, known=("noise", "swap")),
    "keep": partial(text, known=("known", "all")),
    "direction": partial(text, known=("denoise", "noise")),
    "seed": whole,
}
"""How [trace] is read; the words are those of `kt.tracing`, repeated here because that loads torch."""


@dataclass(frozen=True, kw_only=True)
class TraceRecipe(FigureRecipe):
    """`settings` are arguments of `kt.causal_trace`."""

    kind = "trace"

    kinds: tuple[str, ...]
    settings: Mapping[str, Any]


def read(path: Path, content: Mapping[str, Any], shared: Mapping[str, Any]) -> TraceRecipe:
    settings = {key: READERS[key](path, f"[trace] {key}", value) for key, value in content.get("trace", {}).items()}
    kinds = tuple(settings.pop("kinds", ("mlp", "attn")))
    claims = read_claims(path, content, trace_checks.CHECKS, trace_checks.VALUES | {"kind": kinds, "than": kinds})
    if any(claim.check == "alpha" for claim in claims) and not {"mlp", "attn"} <= set(kinds):
        raise BadFile(f"{path}: a claim is about α, and [trace] kinds is {', '.join(kinds)}; trace mlp and attn")
    return TraceRecipe(
        **shared,
        n_facts=most_of(path, content),
        claims=claims,
        kinds=kinds,
        seeds=(settings.pop("seed", 0),),
        settings=settings,
    )


def run(recipe: TraceRecipe, how: How) -> FigureRun[Trace]:
    """One trace a model, both figures, and the claims."""
    from ..tracing import causal_trace
    from ..tracing.patches import check_kinds

    try:
        check_kinds(recipe.kinds)  # before a model is loaded
    except KtError as error:
        raise KtError(f"recipe {recipe.name}: {error}") from None
    used = recipe
    if how.smoke:
        used = replace(recipe.few(SMOKE_FACTS), settings={**recipe.settings, "samples": SMOKE_SAMPLES})
    facts = figure_facts(used, how, "answer")
    rows = None if how.batch_size == "auto" else int(how.batch_size)

    def measure(model: TracedModel, tick: Progress) -> Trace:
        return causal_trace(
            model, facts, used.kinds, METRICS, max_rows=rows, progress=tick, seed=used.seeds[0], **used.settings
        )

    return figure_run(
        used, how, "tracing", measure, View(FILES["trace"], trace_checks.check, _figures, _summary, _curves)
    )


def _figures(trace: Trace) -> dict[str, go.Figure]:
    """Figure 1 for each metric, Figure 2."""
    panels = {f"figure-1-{metric.replace('_', '-')}": trace.heatmaps(metric) for metric in METRICS}
    return {**panels, "figure-2": trace.curves()}


def _summary(model: str, trace: Trace) -> Table:
    """The strongest layer of each module at the last subject token."""
    lines = []
    for kind in trace.kinds:
        for metric in METRICS:
            curve = trace.curve(kind, metric)
            peak = peak_layer(trace_checks.effects(trace, {"kind": kind, "metric": metric}))
            at = int(peak.mean)
            effect = interval(curve.mean[at], (curve.low[at], curve.high[at]))
            lines.append([kind, metric.replace("_", " "), peak_words(peak), effect, str(curve.n)])
    columns = ["module", "metric", "peak [95%]", "effect there [95%]", "n"]
    left = f"{count(trace.n_facts, 'fact')} traced; {trace.why_left_out()}"
    return Table(columns, lines, f"{model}: strongest layer at the last subject token", left)


def _curves(trace: Trace) -> dict[str, Any]:
    return {
        "n_facts": trace.n_facts,
        "left_out": [fact._asdict() for fact in trace.left_out],
        "curves": {kind: {m: trace.curve(kind, m)._asdict() for m in METRICS} for kind in trace.kinds},
    }


TRACE = Kind(
    {
        "": Keys(("trace", "claims")),
        "data": DATA,
        "trace": Keys(tuple(READERS)),
    },
    read,
    run,
)
