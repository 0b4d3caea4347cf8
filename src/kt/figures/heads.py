"""Attention split by head: heads down, layers across, at one token role."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from numpy import ndarray

from .heatmap import heatmap_panel
from .panel import Panel


def heads_figure(
    values: Float[ndarray, "layer head"],
    low: Float[ndarray, "layer head"] | None = None,
    high: Float[ndarray, "layer head"] | None = None,
    q: Float[ndarray, "layer head"] | None = None,
    *,
    title: str,
    subtitle: str = "",
    p: Float[ndarray, "layer head"] | None = None,
    n: Float[ndarray, "layer head"] | int | None = None,
    heads: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    **panel: Any,
) -> go.Figure:
    """The effect of every head of every layer, in the look of the other heatmaps.

    Args:
        values, low, high, p, q, n: one number per layer and head; NaN is not measured.
        heads, layers: their numbers, if not 0, 1, ...
        panel: further fields of `Panel`: colour_title, zmax, alpha, over.

    Raises:
        ValueError: shapes that do not match.
    """
    cells = {"low": low, "high": high, "q": q, "p": p, "n": n}
    turned = {k: v if v is None or np.ndim(v) == 0 else np.asarray(v, dtype=float).T for k, v in cells.items()}
    values = np.asarray(values, dtype=float).T
    rows = [f"head {h}" for h in (range(len(values)) if heads is None else heads)]
    only = Panel(values, rows, kind="attn", title="", row_word="", layers=layers, **{**turned, **panel})  # type: ignore[arg-type]
    return heatmap_panel([only], title=title, subtitle=subtitle)
