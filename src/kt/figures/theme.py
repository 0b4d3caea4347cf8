"""Colours, fonts and sizes of all figures, without importing plotly.

Each kind has one hue (MLP green, attention red, hidden state purple, as in ROME's figures), a sequential scale whose
lightness falls monotonically, and its own marker and dash, so that readers need not tell red from green.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

WIDTH = 900
"""Pixels: the width for which figures are laid out, and of PNG and SVG files."""

FONT = "Inter, 'Segoe UI', 'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"
INK, MUTED, RULE, PAPER = "#1b2130", "#566071", "#e3e6eb", "#ffffff"
UNTRACED = "#dfe2e7"
"""Cells without a value."""

TITLE_SIZE, TEXT_SIZE, SMALL_SIZE = 17, 13, 12
QUIET = {"size": SMALL_SIZE, "color": MUTED}
"""The font of notes."""

TITLE_WRAP, SUBTITLE_WRAP = 78, 112
"""Characters per line of a title at WIDTH."""

BELOW_ZERO = ("#edf1f6", "#b4c3d6", "#7590ae", "#3f5a78")
"""Colours from just below zero to minus the top of the scale."""

SERIES = ("#0b6e99", "#b35300", "#6a51a3", "#00795c", "#a83253", "#6b6b1f")
"""Colours of lines without a kind."""


@dataclass(frozen=True)
class Look:
    """The look of one kind of site or answer."""

    label: str
    line: str
    dash: str
    symbol: str
    scale: tuple[str, ...]


_GREENS = ("#f7fcf5", "#e5f5e0", "#c7e9c0", "#a1d99b", "#74c476", "#41ab5d", "#238b45", "#006d2c", "#00441b")
_REDS = ("#fff5f0", "#fee0d2", "#fcbba1", "#fc9272", "#fb6a4a", "#ef3b2c", "#cb181d", "#a50f15", "#67000d")
_PURPLES = ("#fcfbfd", "#efedf5", "#dadaeb", "#bcbddc", "#9e9ac8", "#807dba", "#6a51a3", "#54278f", "#3f007d")

_SEVERED = ("Hidden state, MLP severed", "Hidden state, attention severed")
KINDS = {
    "mlp": Look("MLP", "#0a7d53", "solid", "circle", _GREENS),
    "attn": Look("Attention", "#cf3a24", "dash", "square", _REDS),
    "hidden": Look("Hidden state", "#6a51a3", "dot", "diamond", _PURPLES),
    "hidden-no-mlp": Look(_SEVERED[0], "#b35300", "dashdot", "diamond-wide", _PURPLES),
    "hidden-no-attn": Look(_SEVERED[1], "#0b6e99", "longdash", "diamond-tall", _PURPLES),
}
ANSWERS = {
    "original": Look("Original answer", "#0b6e99", "solid", "circle", _PURPLES),
    "target": Look("Target answer", "#b35300", "dash", "square", _PURPLES),
    "control": Look("Other answers", "#566071", "dot", "diamond", _PURPLES),
}
"""Lines of the contrast probe; they always differ in colour and dash."""

STAGES = {"enrichment": "#00795c", "extraction": "#6a51a3", "promotion": "#a83253"}
"""Tints of JEEP's stages of recall."""


def look(kind: str | None, index: int = 0) -> Look:
    """The look of a kind; other lines take the colour of their `index`, and heads that of their number."""
    known = KINDS | ANSWERS
    if kind is not None and str(kind) in known:
        return known[str(kind)]
    label, scale = str(kind or ""), tuple[str, ...](_PURPLES)
    if (single := single_of(label)) is not None:
        word, index = single
        module = KINDS["attn" if word == "head" else "mlp"]
        label, scale = f"{module.label}, {word} {index}", module.scale
    colour = SERIES[index % len(SERIES)]
    symbols, dashes = ("circle", "square", "diamond", "triangle-up"), ("solid", "dash", "dot", "dashdot")
    return Look(label, colour, dashes[index % 4], symbols[index % 4], scale)


SINGLES = {"attn.h": "head", "mlp.e": "expert", "mlp.s": "shared expert"}


def single_of(kind: str) -> tuple[str, int] | None:
    """What one part of a module is, and its number: of `attn.h3`, `mlp.e3`, `mlp.s0`; None for other kinds."""
    match = re.fullmatch(r"(attn\.h|mlp\.[es])(\d+)", str(kind))
    return (SINGLES[match[1]], int(match[2])) if match else None


def head_of(kind: str) -> int | None:
    """The head's number in a kind such as `attn.h3`; None for other kinds."""
    single = single_of(kind)
    return single[1] if single is not None and single[0] == "head" else None


def mark_colour(kind: str | None) -> str:
    """The tint of a mark: of its stage, of its kind, or grey."""
    if kind is None:
        return MUTED
    return STAGES.get(str(kind)) or look(kind).line


def colorscale(colours: tuple[str, ...]) -> list[list[float | str]]:
    """Plotly's colour scale of colours at equal steps."""
    return [[i / (len(colours) - 1), colour] for i, colour in enumerate(colours)]


def colour_at(colours: tuple[str, ...], share: float) -> tuple[int, int, int]:
    """The colour at `share` (0 to 1) of a scale, as red, green and blue."""
    channels = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colours], dtype=float)
    positions = np.linspace(0, 1, len(colours))
    red, green, blue = (round(float(np.interp(share, positions, channels[:, i]))) for i in range(3))
    return red, green, blue


def cell_colour(scale: tuple[str, ...], value: float, zmax: float) -> tuple[int, int, int]:
    """A cell's colour: `scale` from zero up to `zmax`, `BELOW_ZERO` from zero down to minus `zmax`."""
    share = min(1.0, abs(value) / zmax)
    return colour_at(scale if value >= 0 else BELOW_ZERO, share)


def transparent(colour: str, opacity: float) -> str:
    """A hexadecimal colour as CSS rgba."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def axis(**more: Any) -> dict[str, Any]:
    """Fields of a plotly axis in the theme's style, with `more` fields; `title` is its text."""
    style: dict[str, Any] = {
        "showline": True,
        "linecolor": MUTED,
        "linewidth": 1,
        "gridcolor": RULE,
        "zeroline": False,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": MUTED,
        "tickfont": {"size": SMALL_SIZE, "color": INK},
        "title": {"font": {"size": TEXT_SIZE, "color": MUTED}, "standoff": 8},
    }
    title = more.pop("title", None)
    return {**style, **more} | ({"title": {**style["title"], "text": title}} if title else {})


def note(text: str, **more: Any) -> dict[str, Any]:
    """A plotly annotation without an arrow."""
    return {
        "text": text,
        "showarrow": False,
        "font": {"size": TEXT_SIZE, "color": INK},
        "xref": "paper",
        "yref": "paper",
        **more,
    }
