"""Figures of the contrast probe: both answers by layer with JEEP's stages (JEEP, Figure 2), the same before and after
an edit, and word sets (JEEP, Figure 5).

Lines are `Series` over layers; x = -1 is the embedding (the input of block 0). `kind` sets their look: "original",
"target" or "control" (other answers of the relation). Ranks count from 0, the top. They are drawn at rank + 1 on a
logarithmic axis that runs downwards, so a line that rises improves its rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from ..stats import Interval
from .curves import Mark, Series, curve_panels
from .text import interval_line, number

POSITION_TITLES = {"subject_last": "Last subject token", "prediction": "Prediction position"}
KIND_TITLES = {"resid": "Residual stream", "attn": "Attention output", "mlp": "MLP output"}
METRIC_TITLES = {"rank": "rank (0 is the top)", "prob": "probability"}
SCALES = {"rank": "rank"}


def probe_figure(
    panels: Mapping[str, Mapping[str, Sequence[Series]]],
    *,
    title: str,
    subtitle: str = "",
    stages: Mapping[str, Sequence[Mark]] | None = None,
    metric_titles: Mapping[str, str] | None = None,
) -> go.Figure:
    """Figure 2 of JEEP: {position: {metric: lines}} as a grid, positions down and metrics across.

    Args:
        panels: positions "subject_last" and "prediction" (any other name is its own title), each with the same
            metrics: "rank" and "prob".
        stages: {position: marks} to shade: `Mark("enrichment", 1, 3, kind="enrichment")` covers layers 1 to 3;
            `Mark("layers_low", 1, 2, kind="enrichment", strip=True)` is a bar along the top for the layers proposed
            for editing. The kinds "enrichment", "extraction" and "promotion" have their own colours.
        metric_titles: y titles, such as {"rank": "mean rank (0 is the top)"}.

    Raises:
        ValueError: no panel, or positions with different metrics.
    """
    metrics = list(next(iter(panels.values()), {}))
    if not metrics or any(list(lines) != metrics for lines in panels.values()):
        raise ValueError("probe_figure needs one position or more, all with the same metrics")
    names = METRIC_TITLES | dict(metric_titles or {})
    flat = {f"{position} {metric}": panels[position][metric] for position in panels for metric in metrics}
    keys = {f"{position} {metric}": (position, metric) for position in panels for metric in metrics}
    return curve_panels(
        flat,
        title=title,
        subtitle=subtitle,
        x_title="layer",
        y_titles=[names.get(metric, metric) for _, metric in keys.values()],
        columns=len(metrics),
        headings={panel: POSITION_TITLES.get(position, position) for panel, (position, _) in keys.items()},
        scales={panel: SCALES.get(metric, "linear") for panel, (_, metric) in keys.items()},
        marks={panel: (stages or {}).get(position, ()) for panel, (position, _) in keys.items()},
    )


def before_after_probe(
    before: Mapping[str, Sequence[Series]],
    after: Mapping[str, Sequence[Series]],
    *,
    title: str,
    subtitle: str = "",
    score: Interval | None = None,
    metric: str = "rank",
    y_title: str | None = None,
    row_titles: Mapping[str, str] | None = None,
    marks: Mapping[str, Sequence[Mark]] | None = None,
) -> go.Figure:
    """A probe before an edit (left) and after it (right), one row per key; both panels of a row have one y range.

    Args:
        before, after: {row: lines} with the same rows: "resid", "attn", "mlp", positions, or any other names. Use the
            same names of lines on both sides; kinds "original" (old), "target" (new), "control" (other answers).
        score: the residual score, shown before the subtitle with its interval and n.
        metric: "rank" (logarithmic, rank 0 at the top) or "prob".
        row_titles: titles of rows with other names.
        marks: {row: marks}, drawn in both columns, such as the edited layers.

    Raises:
        ValueError: no row, or different rows before and after.
    """
    if not before or list(before) != list(after):
        raise ValueError("before_after_probe needs one row or more, the same before and after")
    titles = KIND_TITLES | POSITION_TITLES | dict(row_titles or {})
    sides = (("before the edit", before), ("after the edit", after))
    cells = [(row, side, lines[row]) for row in before for side, lines in sides]
    key = "{} {}".format
    if score is not None:
        words = f"residual score {number(score.mean)}, {interval_line(score.low, score.high)}, n = {score.n}"
        subtitle = " · ".join(filter(None, (words, subtitle)))
    return curve_panels(
        {key(row, side): lines for row, side, lines in cells},
        title=title,
        subtitle=subtitle,
        x_title="layer",
        y_titles=[y_title or METRIC_TITLES.get(metric, metric)] * len(cells),
        columns=2,
        headings={key(row, side): f"{titles.get(row, row)}, {side}" for row, side, _ in cells},
        scales={key(row, side): SCALES.get(metric, "linear") for row, side, _ in cells},
        marks={key(row, side): (marks or {}).get(row, ()) for row, side, _ in cells},
        shared_rows=True,
    )


def sets_figure(
    series: Sequence[Series],
    *,
    title: str,
    subtitle: str = "",
    y_title: str = "mean probability of a token of the set",
    marks: Sequence[Mark] = (),
) -> go.Figure:
    """Figure 5 of JEEP: one line per word set over layers, on a logarithmic axis; a value of 0 is a gap."""
    return curve_panels(
        {"": series},
        title=title,
        subtitle=subtitle,
        x_title="layer",
        y_titles=[y_title],
        marks=marks,
        scales={"": "log"},
    )
