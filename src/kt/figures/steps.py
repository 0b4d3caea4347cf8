"""Sequential editing: each metric, and how far the written weights have grown, after so many edits.

Edits that pile up fail in two ways that belong side by side: the scores fall, and the weights' norms run away.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import plotly.graph_objects as go

from .curves import Series, curve_panels, limits
from .grid import axis_suffix
from .text import escape

NORM_RATIO = "weight norm ratio"
"""The panel of ‖W_t‖ / ‖W_0‖: an axis around 1 in place of one from 0 to 1."""


def steps_figure(
    runs: Mapping[str, Mapping[str, Series]],
    *,
    title: str,
    subtitle: str = "",
    x_title: str = "edits so far",
    ratios: Collection[str] = (NORM_RATIO,),
    columns: int = 3,
) -> go.Figure:
    """{run: {panel: Series}} as one panel per metric, one line per run; the panels named in `ratios` come last.

    The run names its lines and gives them their colour, dash and marker: `name` and `kind` of the series do not count.
    """
    panels = _panels(runs, ratios)
    if not panels:
        raise ValueError("no run has a series to draw")
    figure = curve_panels(
        panels,
        title=title,
        subtitle=subtitle,
        x_title=x_title,
        y_titles=list(panels),
        columns=columns,
        dashes=True,
        levels=dict.fromkeys(ratios, 1.0),
    )
    for place, (name, lines) in enumerate(panels.items()):
        around = (0.95, 1.05) if name in ratios else (0.0, 1.0)
        figure.layout[f"yaxis{axis_suffix(place)}"].range = limits(lines, *around)
    if len({float(x) for lines in panels.values() for line in lines for x in line.x}) == 1:
        _stand_apart(figure, list(runs))
    return figure


def _panels(runs: Mapping[str, Mapping[str, Series]], ratios: Collection[str]) -> dict[str, list[Series]]:
    """{panel: lines}, in the order in which the runs name the panels, ratios last."""
    names = sorted(dict.fromkeys(name for by_panel in runs.values() for name in by_panel), key=lambda n: n in ratios)
    return {
        name: [replace(by_panel[name], name=run, kind=None) for run, by_panel in runs.items() if name in by_panel]
        for name in names
    }


def _stand_apart(figure: go.Figure, runs: Sequence[str]) -> None:
    """The runs side by side around their only step, where they would hide each other; hovers keep the step."""
    for place, run in enumerate(runs):
        shift = (place - (len(runs) - 1) / 2) * min(0.12, 0.8 / len(runs))
        for trace in figure.select_traces({"name": escape(run)}):
            trace.x = [x + shift for x in trace.x]
