"""`Table`: columns, rows of raw values, a title and a caption; as text, Markdown, LaTeX or a data frame.

Renderers for HTML pages and for terminals are in html.py and terminal.py. A cell holds the value itself (a number, an
`Interval`, a pair); the column's `format`, or the renderer where there is none, makes text of it.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .._util.text import cell, count, interval, visible, visible_lines
from ..stats import Interval

if TYPE_CHECKING:
    import pandas as pd

LONGEST = 160
"""Characters of a text from a file in a cell."""
NOTEBOOK = "padding: 2px 10px; vertical-align: top"
"""Style of a cell in a notebook."""
Only = Literal["", "command", "page"]
"""Where a table or figure is shown: everywhere, by the command alone, or on pages (report, notebook) alone."""


@dataclass(frozen=True)
class Column:
    """A column's heading, the text of its cells, and the terminal style of a cell (a rich style, as `red`)."""

    name: str
    format: Callable[[Any], str] | None = None
    style: Callable[[Any], str] | None = None


@dataclass(frozen=True)
class Table:
    """Rows of raw values under columns.

    Args:
        columns: headings, or `Column`s that say how their cells are written.
        rows: one value a column: texts, numbers, `Interval`s or None.
        title: what the table shows; stands above it.
        caption: how to read it; stands below it.
        digits: decimals of numbers on pages.
        only: see `Only`.

    Raises:
        ValueError: a row has another number of cells than there are columns.
    """

    columns: Sequence[str | Column]
    rows: Sequence[Sequence[Any]]
    title: str = ""
    caption: str = ""
    digits: int = 3
    only: Only = ""

    def __post_init__(self) -> None:
        if wrong := [row for row in self.rows if len(row) != len(self.columns)]:
            raise ValueError(f"a row of {len(wrong[0])} cells does not fit {len(self.columns)} headers: {wrong[0]!r}")

    def _repr_html_(self) -> str:
        """For notebooks: HTML, every text escaped. Each cell brings its style: some notebooks give tables none."""
        sides = ["right" if numeric else "left" for numeric in self.numeric]

        def line(tag: str, cells: Sequence[str]) -> str:
            styled = zip(cells, sides, strict=True)
            inside = (
                f'<{tag} style="{NOTEBOOK}; text-align: {side}">{html.escape(visible_lines(each))}</{tag}>'
                for each, side in styled
            )
            return f"<tr>{''.join(inside)}</tr>"

        caption = html.escape(visible_lines("; ".join(filter(None, (self.title, self.caption)))))
        caption = f'<caption style="{NOTEBOOK}; text-align: left">{caption}</caption>' if caption else ""
        head = line("th", self.headers) if any(self.headers) else ""
        return f"<table>{caption}{head}{''.join(line('td', row) for row in self.cells)}</table>"

    def __repr__(self) -> str:
        return f"Table({self.title!r}: {count(len(self.rows), 'row')} of {', '.join(filter(None, self.headers))})"

    @property
    def heads(self) -> list[Column]:
        """Every column as a `Column`."""
        return [Column(each) if isinstance(each, str) else each for each in self.columns]

    @property
    def headers(self) -> list[str]:
        """The columns' names."""
        return [column.name for column in self.heads]

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold nothing but numbers and intervals (and at least one)."""
        columns = [[row[i] for row in self.rows if row[i] is not None] for i in range(len(self.columns))]
        return [bool(column) and all(is_number(v) for v in column) for column in columns]

    def texts(self, default: Callable[[Any], str] | None = None) -> list[list[str]]:
        """The cells as text; `default` writes those of columns without a format of their own."""
        formats = [column.format or default or cell_text for column in self.heads]
        return [[form(value) for form, value in zip(formats, row, strict=True)] for row in self.rows]

    @property
    def cells(self) -> list[list[str]]:
        """The cells as pages show them: numbers to `digits` decimals, intervals with their n."""
        from .html import show

        return self.texts(lambda value: show(value, self.digits))

    def markdown(self) -> str:
        """A GitHub table; texts from models and data are escaped."""
        lines = [self.headers, ["---"] * len(self.columns), *self.texts()]
        return "\n".join(f"| {' | '.join(map(_escaped_markdown, line))} |" for line in lines)

    def latex(self) -> str:
        """A `tabular` in the style of booktabs, numbers to the right; texts are escaped."""
        align = "".join("r" if numeric else "l" for numeric in self.numeric)
        head, *body = (" & ".join(map(_escaped_latex, line)) + r" \\" for line in (self.headers, *self.texts()))
        lines = [rf"\begin{{tabular}}{{{align}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
        return "\n".join([*lines, r"\end{tabular}"])

    def to_dataframe(self) -> pd.DataFrame:
        """The raw values under the columns' names."""
        import pandas as pd

        return pd.DataFrame([list(row) for row in self.rows], columns=self.headers)


def pairs(rows: Sequence[Sequence[Any]], title: str, heading: str = "", only: Only = "") -> Table:
    """A table of names and values, the names' column without a heading."""
    return Table(["", heading], rows, title, only=only)


def cell_text(value: Any) -> str:
    """A cell of a terminal: three decimals, intervals as `0.412 [0.390, 0.430]`, a dash for a missing value."""
    return interval(value.mean, value.ci95) if isinstance(value, Interval) else cell(value)


def before_after(pair: tuple[Any, Any] | None) -> str:
    """`0.012 → 0.981`."""
    return "–" if pair is None else f"{cell(pair[0])} → {cell(pair[1])}"


def layer_list(layers: Sequence[int] | None) -> str:
    """`4, 5, 6`, or `none`."""
    return ", ".join(map(str, layers or ())) or "none"


def shown(value: Any) -> Any:
    """A value from a file as a cell: texts on one line of at most 160 characters, lists with commas, numbers as is."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    if isinstance(value, Mapping):
        value = ", ".join(f"{name} {item}" for name, item in value.items())
    elif isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    text = visible(str(value))
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def setting(value: Any) -> Any:
    """A hyper-parameter as a user types it: every digit that it has."""
    return f"{value:g}" if isinstance(value, float) else shown(value)


def is_number(value: Any) -> bool:
    """Whether a value is a number or an interval: Python's or numpy's, no truth value."""
    if isinstance(value, bool):
        return False
    return isinstance(value, int | float | Interval) or (hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0)


def _escaped_markdown(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")


_LATEX = {c: rf"\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\^{}"}


def _escaped_latex(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in visible(visible_lines(text)))
