"""A heatmap in the terminal: coloured cells, or shades of ASCII without colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float
from numpy import ndarray
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

from .._util.text import visible
from . import theme
from .heatmap import Panel
from .layout import every
from .text import readable_token

_SHADES = " .:=+*#%@"
_NEGATIVE = "-"
_HATCH = "/"
_GREY = "rgb(118,126,140)"
_LABEL = 24


@dataclass(frozen=True, eq=False)
class TerminalHeatmap:
    """A rich renderable: rows left, layers across, a legend below. Layers are binned if they do not fit."""

    panel: Panel
    title: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        colour = console.color_system is not None and not console.no_color
        plain = options.ascii_only or not options.encoding.startswith("utf")
        label = min(_LABEL, max(cell_len(text) for text in self._labels(plain)), options.max_width // 3)
        room = max(1, options.max_width - label - 2)
        layers, hatched = list(self.panel.layers or ()), self.panel.hatched
        size = -(-len(layers) // room)
        bins, marks = _binned(self.panel.values, hatched, size)
        wide = max(1, min(4, room // bins.shape[1]))
        if self.title:
            yield Text(visible(self.title), style="bold", overflow="ellipsis", no_wrap=True)
        for row, text in enumerate(self._labels(plain)):
            cells = list(zip(bins[row], marks[row], strict=True))
            yield self._row(cells, text, label, wide, row in set(self.panel.subject_rows), colour)
        yield Text(" " * (label + 1) + _axis(layers[::size], wide))
        yield self._legend(label, colour, size)
        if hatched.any():
            yield Text(f"{' ' * (label + 1)}{_HATCH} not told apart from 0", no_wrap=True, overflow="ellipsis")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(24, options.max_width)

    def _labels(self, plain: bool) -> list[str]:
        labels = [readable_token(row, _LABEL - 1) for row in self.panel.rows]
        if plain:
            labels = [text.replace("·", "_").encode("ascii", "replace").decode() for text in labels]
        return [f"{text}*" if row in set(self.panel.subject_rows) else text for row, text in enumerate(labels)]

    def _row(
        self, cells: Sequence[tuple[float, bool]], text: str, label: int, wide: int, subject: bool, colour: bool
    ) -> Text:
        line = Text(" " * (label - cell_len(text)) + set_cell_size(text, min(label, cell_len(text))), no_wrap=True)
        line.stylize("bold" if subject else "")
        line.append(" ")
        for value, faint in cells:
            self._paint(line, float(value), wide, colour, bool(faint))
        return line

    def _paint(self, line: Text, value: float, wide: int, colour: bool, faint: bool = False) -> None:
        if not np.isfinite(value):
            line.append(" " * wide)
        elif colour:
            red, green, blue = theme.cell_colour(theme.look(self.panel.kind).scale, value, self.panel.top)
            ink = f"{_GREY} " if faint else ""
            line.append((_HATCH if faint else " ") * wide, style=f"{ink}on rgb({red},{green},{blue})")
        else:
            shade = _shade(value, self.panel.top)
            line.append(((_HATCH + shade) * wide)[:wide] if faint else shade * wide)

    def _legend(self, label: int, colour: bool, size: int) -> Text:
        values, top = self.panel.values, self.panel.top
        finite = values[np.isfinite(values)]
        line = Text(" " * (label + 1) + "0 ", no_wrap=True, overflow="ellipsis")
        for share in np.linspace(0, 1, len(_SHADES)):
            self._paint(line, float(share) * top, 1, colour)
        line.append(f" {top:.3g}   min {finite.min(initial=np.inf):.3g}" if finite.size else " no values")
        if self.panel.lowest < 0:
            line.append("   below 0 ")
            self._paint(line, -top / 2, 2, colour)
        if size > 1:
            line.append(f"   max of {size} layers per cell")
        return line


def terminal_heatmap(
    values: Float[ndarray, "row layer"],
    rows: Sequence[str],
    title: str = "",
    *,
    kind: str = "mlp",
    subject_rows: Sequence[int] = (),
    layers: Sequence[int] | None = None,
    q: Float[ndarray, "row layer"] | None = None,
    alpha: float = 0.05,
    n: ndarray | int | None = None,
) -> TerminalHeatmap:
    """A heatmap for rich: `Console().print(terminal_heatmap(...))`.

    `q`, `alpha` and `n` as in `Panel`: cells not told apart from zero are hatched with "/".

    Raises:
        ValueError: the shape of `values` does not fit the rows.
    """
    panel = Panel(values, rows, kind=kind, n=n, subject_rows=subject_rows, layers=layers, q=q, alpha=alpha)
    return TerminalHeatmap(panel, title)


def _binned(
    values: Float[ndarray, "row layer"], marks: Bool[ndarray, "row layer"], size: int
) -> tuple[Float[ndarray, "row bin"], Bool[ndarray, "row bin"]]:
    """The largest value of each `size` neighbouring layers (NaN if all are NaN), and the mark of that value."""
    spare = ((0, 0), (0, -values.shape[1] % size))
    numbers = np.pad(np.where(np.isnan(values), -np.inf, values), spare, constant_values=-np.inf)
    numbers, marks = (
        rearrange(a, "row (bin layer) -> row bin layer", layer=size) for a in (numbers, np.pad(marks, spare))
    )
    largest = numbers.argmax(-1, keepdims=True)
    best, marked = (np.take_along_axis(a, largest, -1)[..., 0] for a in (numbers, marks))
    return np.where(np.isinf(best), np.nan, best), marked


def _shade(value: float, top: float) -> str:
    if value < 0:
        return _NEGATIVE if value < -0.05 * top else _SHADES[0]
    return _SHADES[min(len(_SHADES) - 1, int(value / top * len(_SHADES)))]


def _axis(layers: Sequence[int], wide: int) -> str:
    """Layer numbers under their columns, as many as fit."""
    width = len(str(layers[-1])) + 1
    step = every(len(layers), len(layers) * wide, width)
    return "".join(str(layer).ljust(step * wide) for layer in layers[::step]).rstrip()
