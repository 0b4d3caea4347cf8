"""A sweep as a figure and as rows of a table: which metrics, under which names, over which axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cells import interval
from .grids import JOINT

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from ..figures import Series
    from .result import Row, Sweep

SHOWN = {
    "edit success": "edit_success_tf_exact",
    "paraphrase": "paraphrase_tf_exact",
    "locality": "neighbourhood_same_argmax",
    "portability": "portability_tf_exact",
    "fluency (bits)": "fluency_ngram_entropy_gen",
}
"""Panels and columns, and the metric behind each: those of the default protocols, tf and gen."""
ASKED = {
    "P(new) > P(old)": "efficacy_prob_success",
    "P(new) > P(old), rephrased": "generalization_prob_success",
    "P(own) > P(new), neighbours": "specificity_prob_success",
    "free answer": "edit_success_wild_contains",
    "free answer, rephrased": "paraphrase_wild_contains",
    "free answer, neighbours": "neighbourhood_wild_contains",
    "perplexity": "perplexity_heldout",
}
"""Those that come with the protocols prob, wild and ppl."""
GREEDY = {"greedy text": "edit_success_gen_exact", "greedy text, rephrased": "paraphrase_gen_exact"}
"""Those of gen where tf was not asked for."""
A_TABLE = 5

AXES = {
    "alpha": "α, attention's share",
    "layers": "layers",
    "edits": "edits in one batch",
    "clamp": "clamp ratio γ",
    "modules": "modules",
}
NAMED = ("layers", "modules")
"""Kinds whose points are names, not numbers."""


def figure(found: Sweep) -> go.Figure:
    """One panel a metric, one line a series (or, where points are names, one marker a point)."""
    from ..figures.sweep import Traced, sweep_figure

    traced = None
    if found.balance is not None and found.kind == "alpha":
        ci95 = found.balance.get("ci95")
        traced = Traced(float(found.balance["alpha"]), None if ci95 is None else (float(ci95[0]), float(ci95[1])))
    named, shown = found.kind in NAMED, columns(found)
    runs = _by_point(found) if named else _by_series(found)
    return sweep_figure(
        runs,
        title=f"{found.about['model']}: {AXES.get(found.kind, found.kind)}",
        subtitle=f"{found.about['n_facts']} facts; means over records with 95% intervals{_how(shown)}",
        x_title=AXES.get(found.kind, "point"),
        scale="log" if found.kind == "edits" else "linear",
        names=[row.label for row in found.rows] if named else (),
        traced=traced,
    )


def _how(shown: Mapping[str, str]) -> str:
    """What of it is teacher-forced, and what is a mean over something else."""
    if set(shown) <= set(SHOWN):
        return ", teacher-forced"
    forced = "; edit success, paraphrase, portability: teacher-forced" * ("edit success" in shown)
    return forced + "; perplexity: over documents" * ("perplexity" in shown)


def columns(found: Sweep) -> dict[str, str]:
    """The panels that at least one row has something for."""
    there = {name for row in found.rows for name, metric in row.metrics.items() if metric["n"]}
    greedy = {} if SHOWN["edit success"] in there else GREEDY
    return {panel: name for panel, name in (greedy | SHOWN | ASKED).items() if name in there}


def tables(found: Sweep) -> list[dict[str, str]]:
    """The panels by `A_TABLE`: what stands beside each other in a terminal. One without any, where there are none."""
    shown = list(columns(found).items())
    return [dict(shown[i : i + A_TABLE]) for i in range(0, max(1, len(shown)), A_TABLE)]


def table_rows(found: Sweep, shown: Mapping[str, str]) -> list[list[Any]]:
    """Cells: name, means with intervals, n, seconds."""
    lines = []
    for row in found.rows:
        cells = [_cell(row.metrics.get(name)) for name in shown.values()]
        lines.append([row.series, row.label, *cells, row.edits, round(sum(row.seconds.values()), 1)])
    return lines


def difference_rows(found: Sweep, shown: Mapping[str, str]) -> list[list[Any]]:
    """Paired differences of the joint edit to its parts."""
    return [
        [name, *(_cell(by.get(metric) and by[metric].as_dict()) for metric in shown.values())]
        for name, by in found.differences().items()
        if name.startswith(JOINT)
    ]


def _cell(metric: Any) -> str:
    return "–" if not metric else interval(metric["mean"], metric["ci95"])


def _by_series(found: Sweep) -> dict[str, dict[str, Series]]:
    """{series: {panel: its line}}."""
    runs: dict[str, dict[str, Series]] = {}
    for name in dict.fromkeys(row.series for row in found.rows):
        rows = sorted((row for row in found.rows if row.series == name), key=lambda row: row.x)
        runs[name] = {panel: _line(panel, rows, metric) for panel, metric in columns(found).items()}
    return runs


def _by_point(found: Sweep) -> dict[str, dict[str, Series]]:
    """{point: {panel: its marker}}."""
    shown = columns(found).items()
    return {row.label: {panel: _line(panel, [row], metric) for panel, metric in shown} for row in found.rows}


def _line(panel: str, rows: list[Row], metric: str) -> Series:
    from ..figures import Series

    cells = [row.metrics.get(metric) or {"mean": None, "ci95": None, "n": 0} for row in rows]
    bounds = np.array([cell["ci95"] or (np.nan, np.nan) for cell in cells], dtype=float)
    means = np.array([np.nan if cell["mean"] is None else cell["mean"] for cell in cells], dtype=float)
    counts = np.array([cell["n"] for cell in cells])
    return Series(panel, [row.x for row in rows], means, bounds[:, 0], bounds[:, 1], counts)
