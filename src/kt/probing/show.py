"""Figures and the short summary of a probe; what they draw is computed in result.py and stages.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .._util.text import html_table
from .lens import POSITIONS
from .questions import ANSWERS
from .result import METRICS, LensCurve, Probe

if TYPE_CHECKING:
    import plotly.graph_objects as go


NAMES = {"original": "original answer", "target": "target answer"}
KIND_TITLES = {"resid": "residual stream", "attn": "attention output", "mlp": "MLP output"}
POSITION_TITLES = {"subject_last": "last subject token", "prediction": "prediction position"}

_STAGES_AT = {"subject_last": ("enrichment",), "prediction": ("extraction", "promotion")}
_PROPOSED = {"enrichment": "layers_low", "promotion": "layers_high"}


def figure(probe: Probe, kind: str, statistic: str) -> go.Figure:
    """See `Probe.figure`."""
    from ..figures.probe import probe_figure

    panels = {
        position: {metric: _lines(probe, kind, position, metric, statistic) for metric in METRICS}
        for position in POSITIONS
    }
    return probe_figure(
        panels,
        title=f"Contrast probe of {probe.metadata['model']}, {KIND_TITLES[kind]}",
        subtitle=_subtitle(probe),
        stages={position: _marks(probe, position) for position in POSITIONS} if kind == "resid" else None,
        metric_titles={"rank": f"{statistic} rank (0 is the top)", "prob": f"{statistic} probability"},
    )


def _lines(probe: Probe, kind: str, position: str, metric: str, statistic: str) -> list[Any]:
    curves = {a: probe.curve(kind, position, a, metric, statistic, start=True) for a in ANSWERS}
    return [_series(NAMES[answer], curve, answer) for answer, curve in curves.items()]


def _series(name: str, curve: LensCurve, kind: str | None) -> Any:
    from ..figures import Series

    return Series(name, curve.layers, curve.mean, curve.low, curve.high, curve.n, kind)


def _marks(probe: Probe, position: str) -> list[Any]:
    from ..figures import Mark

    marks = []
    for name in _STAGES_AT[position]:
        stage = getattr(probe.stages, name)
        if stage.found:
            marks.append(Mark(name, stage.layers[0], stage.layers[-1], kind=name))
        proposed = getattr(probe.stages, _PROPOSED.get(name, ""), None)
        if proposed:
            marks.append(Mark(_PROPOSED[name], proposed[0], proposed[-1], kind=name, strip=True))
    return marks


def sets_figure(probe: Probe, kind: str, position: str) -> go.Figure:
    """See `Probe.sets_figure`."""
    from ..figures.probe import sets_figure as draw

    series = [_series(NAMES["original"], probe.curve(kind, position, "original", "prob"), "original")]
    series += [_series(name, probe.set_curve(name, kind, position), None) for name in probe.set_names]
    title = f"Word sets in {probe.metadata['model']}, {KIND_TITLES[kind]}, {POSITION_TITLES[position]}"
    return draw(series, title=title, subtitle=_subtitle(probe))


def _subtitle(probe: Probe) -> str:
    n, same = int(probe.counted.sum()), len(probe.same_first_token)
    parts = [f"{n} distinct fact{'' if n == 1 else 's'}, 95% intervals over facts"]
    parts += ["raw: without the final norm"] * (not probe.metadata["final_norm"])
    parts += [f"{same} with one first token for both answers"] * bool(same)
    return " · ".join(parts)


def summary_html(probe: Probe) -> str:
    """A table of the stages and of both answers at the last layer read."""
    stages, last = probe.stages, len(probe.layers) - 1
    rows = []
    for stage in (stages.enrichment, stages.extraction, stages.promotion):
        layers = ", ".join(map(str, stage.layers)) if stage.found else "none"
        rows.append((stage.name.capitalize(), layers, stage.reason or f"gain {stage.gain}"))
    for name in ("layers_low", "layers_high"):
        proposed = getattr(stages, name)
        rows.append((name, "none" if proposed is None else ", ".join(map(str, proposed)), "proposed to edit"))
    for answer in ANSWERS:
        curve = probe.curve("resid", "prediction", answer, "rank", "median")
        words = f"median rank at the prediction position, n = {curve.n}"
        rows.append((NAMES[answer].capitalize(), f"{np.round(curve.mean[last], 1):g}", words))
    return html_table(repr(probe), (), rows)
