"""The frame around every figure: title, margins and height, measured in pixels so that nothing overlaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from . import theme
from .text import wrap


class Heading(NamedTuple):
    """A title with a quieter second line, the pixels that they take, and where plotly is to hang them."""

    text: str
    height: int
    top: int


def heading(title: str, subtitle: str = "") -> Heading:
    """The escaped title block; long model names wrap."""
    first = wrap(title, theme.TITLE_WRAP)
    second = wrap(subtitle, theme.SUBTITLE_WRAP)
    small = f'<span style="font-size:{theme.TEXT_SIZE}px;color:{theme.MUTED}">'
    lines = [f"<b>{line}</b>" for line in first] + [f"{small}{line}</span>" for line in second]
    # plotly hangs one line from its capital height, but several from the first base line.
    top = 16 if len(lines) == 1 else 29
    return Heading("<br>".join(lines), 18 + 22 * len(lines) if lines else 10, top)


def frame(head: Heading, *, above: int, plot: int, below: int, left: int, right: int = 24) -> dict[str, Any]:
    """Layout with `plot` pixels of plotting height, `above` and `below` it; the width is the reader's."""
    top = head.height + above
    height = top + plot + below
    return {
        "title": {
            "text": head.text,
            "font": {"size": theme.TITLE_SIZE, "color": theme.INK},
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            "y": 1 - head.top / height,
            "yref": "container",
            "yanchor": "top",
            "pad": {"l": 20},
        },
        "font": {"family": theme.FONT, "size": theme.TEXT_SIZE, "color": theme.INK},
        "margin": {"l": left, "r": right, "t": top, "b": below, "autoexpand": False},
        "height": height,
        "paper_bgcolor": theme.PAPER,
        "plot_bgcolor": theme.PAPER,
        "hoverlabel": {
            "bgcolor": theme.PAPER,
            "bordercolor": theme.MUTED,
            "align": "left",
            "font": {"family": theme.FONT, "size": theme.TEXT_SIZE, "color": theme.INK},
        },
        "template": "none",
    }


def legend(plot: int, above: int) -> dict[str, Any]:
    """One row, left, `above` pixels over the plot."""
    return {
        "orientation": "h",
        "x": 0,
        "xanchor": "left",
        "y": 1 + above / plot,
        "yanchor": "bottom",
        "font": {"size": theme.TEXT_SIZE},
        "itemwidth": 40,
    }


def every(count: int, pixels: float, label: int = 24) -> int:
    """Label each 1st, 2nd, 5th, ... of `count` places so that labels of `label` pixels do not touch."""
    steps = [m * 10**e for e in range(5) for m in (1, 2, 5)]
    return next((s for s in steps if count / s * label <= pixels), count)


def layer_ticks(layers: Sequence[int], pixels: float) -> dict[str, Any]:
    """Ticks at positions 0, 1, ... that name the layers, as many as fit."""
    step = every(len(layers), pixels)
    shown = range(0, len(layers), step)
    return {"tickmode": "array", "tickvals": list(shown), "ticktext": [str(layers[i]) for i in shown]}
