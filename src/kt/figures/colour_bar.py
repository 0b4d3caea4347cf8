"""The colour bar below a heatmap, with what its colours mean in words."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import theme
from .panel import Panel
from .text import escape, number

DROP = 52
"""Pixels from the plot down to the bar: layer ticks and the axis title."""

_BAR = 96  # pixels below the plot: DROP, then the bar with its ticks and the first line of its title


def room_below(panel: Panel) -> int:
    """Pixels that a panel needs below its plot."""
    return _BAR + 6 + 16 * (1 + (panel.lowest < 0) + panel.gaps)


def colour_bar(panel: Panel, span: tuple[float, float], bottom: float, top: float, pixels: float) -> dict[str, Any]:
    """Plotly's fields for the bar whose upper edge stands at `bottom` (paper) and whose scale ends at `top`."""
    words = escape(panel.colour_title)
    if panel.lowest < 0:
        shades = "".join(f'<span style="color:{colour}">■</span>' for colour in theme.BELOW_ZERO)
        words += f"<br>{shades} below zero, down to {number(panel.lowest)}"
    if panel.gaps:
        words += f'<br><span style="color:{theme.UNTRACED}">■</span> no value'
    return {
        "orientation": "h",
        "thickness": 10,
        "lenmode": "fraction",
        "len": (span[1] - span[0]) * min(360.0, pixels - 26) / pixels,
        "x": span[0],
        "xanchor": "left",
        "xpad": 0,
        "ypad": 0,
        "y": bottom,
        "yanchor": "top",
        "outlinewidth": 0.5,
        "outlinecolor": theme.MUTED,
        **colour_ticks(top),
        "tickangle": 0,
        "tickfont": {"size": theme.SMALL_SIZE, "color": theme.INK},
        "title": {"text": words, "side": "bottom", "font": {"size": theme.SMALL_SIZE, "color": theme.MUTED}},
    }


def colour_ticks(top: float) -> dict[str, Any]:
    """Round numbers from zero, and the very top of the scale."""
    power = 10 ** np.floor(np.log10(top))
    step = next(s * power for s in (0.1, 0.2, 0.25, 0.5, 1, 2, 2.5, 5) if top / (s * power) <= 4)
    values = [float(v) for v in np.arange(0, top, step) if v <= 0.87 * top] + [top]
    return {"tickmode": "array", "tickvals": values, "ticktext": [f"{v:.3g}" for v in values]}
