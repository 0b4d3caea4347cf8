"""Write a report: one HTML file that opens offline, with plotly.js in it once, which runs when a figure is first open.

Everything that comes from models and data passes through jinja2 with autoescape on (text) or through plotly's JSON
(figures), so that a prompt such as `<script>` is only ever read. A content security policy forbids the page every
other source; without figures only the page's own script may run, by its hash. The same blocks give the same bytes: pass
the time in `meta` if it should be there.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._util.files import write_named
from .._util.text import visible, visible_lines
from ..stats import Interval
from .table import Only, Table, is_number

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from jinja2 import Template


@dataclass(frozen=True)
class Text:
    """Paragraphs."""

    paragraphs: str | Sequence[str]

    @property
    def lines(self) -> list[str]:
        return [self.paragraphs] if isinstance(self.paragraphs, str) else list(self.paragraphs)


@dataclass(frozen=True)
class Figure:
    """A plotly figure with a caption.

    `alt` describes it to people who cannot see it, `name` is the stem of its file, `only` says where it is shown.
    """

    figure: go.Figure
    caption: str = ""
    alt: str = ""
    name: str = ""
    only: Only = ""


@dataclass(frozen=True)
class Card:
    """A key figure: its name, its value, and what stands small below it (an interval and n, for a mean)."""

    name: str
    value: Any
    note: str = ""
    digits: int = 3

    @property
    def shown(self) -> str:
        return show(float(self.value.mean) if isinstance(self.value, Interval) else self.value, self.digits)

    @property
    def below(self) -> str:
        spread = interval_words(self.value, self.digits) if isinstance(self.value, Interval) else ""
        return " · ".join(part for part in (spread, self.note) if part)


Block = Text | Table | Figure


@dataclass(frozen=True)
class Section:
    """A heading with blocks below it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class App:
    """A part of the page that its own script draws: its style, the script, and its data as base64."""

    style: str
    script: str
    data: str


def build(title: str, sections: Sequence[Section], out: str | PathLike[str], *given: Any, **more: Any) -> Path:
    """Write the report to `out`, whole or not at all; for the other arguments see `render`.

    Returns:
        The file's path.

    Raises:
        NotWritable: the file cannot be written.
    """
    return write_named(Path(out), render(title, sections, *given, **more))


def render(
    title: str,
    sections: Sequence[Section],
    meta: Mapping[str, Any] | None = None,
    *,
    summary: Sequence[Card] = (),
    lead: str = "",
    tone: str = "",
    warnings: Sequence[str] = (),
    app: App | None = None,
    fold: bool = False,
) -> str:
    """The report as HTML text.

    Args:
        title: of the page.
        sections: headings with their texts, tables and figures.
        meta: the footer: versions, seed, command.
        summary: key figures under the title.
        lead: a few sentences under the title.
        tone: `good`, `mixed` or `bad` colours them.
        warnings: a line each, below them.
        app: a part of the page between the key figures and the sections that draws itself.
        fold: sections are closed until they are clicked, and their figures are drawn then.
    """
    from ..figures.save import POLICY, plotly_library

    chapters = list(_chapters(sections))
    has_figures = any("html" in block for chapter in chapters for block in chapter["blocks"])
    return _template().render(
        title=title,
        lead=lead,
        tone=tone,
        warnings=warnings,
        cards=summary,
        app=app,
        fold=fold,
        sections=chapters,
        meta={name: show(value) for name, value in (meta or {}).items()},
        policy=POLICY if has_figures or app is None else policy_for(app.script),
        plotly=plotly_library() if has_figures else "",
    )


def policy_for(script: str) -> str:
    """A content security policy under which no other script runs, whatever a text brings into the page."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data: blob:"


def _chapters(sections: Sequence[Section]) -> Iterator[dict[str, Any]]:
    """Sections as the template wants them, figures numbered through the whole report."""
    from ..figures.save import figure_html

    count = 0
    for place, section in enumerate(sections, 1):
        blocks: list[dict[str, Any]] = []
        for block in section.blocks:
            if isinstance(block, Figure):
                count += 1
                html = figure_html(block.figure, f"kt-figure-{count}", inert=True)
                alt = block.alt or block.caption or section.title
                blocks.append({"kind": "figure", "html": html, "caption": block.caption, "alt": alt, "number": count})
            else:
                blocks.append({"kind": type(block).__name__.lower(), "block": block})
        yield {"title": section.title, "anchor": f"section-{place}", "blocks": blocks}


def page_style(root: str) -> str:
    """The page's style sheet with its colours at `root`, such as `:root`."""
    return str(_template().environment.get_template("style.css.j2").render(scope=root))


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("kt.report", "")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


def _shown(value: Any) -> Any:
    """Escape characters of texts that a browser acts on; HTML that is ready (Markup) is ours and stays."""
    return visible_lines(value) if type(value) is str else value


def show(value: Any, digits: int = 3) -> str:
    """A cell's text: numbers to `digits` decimals, intervals with their n, nothing as a dash."""
    from ..figures.text import number

    if hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if value is None:
        return "–"
    if isinstance(value, Interval):
        if math.isnan(value.mean):
            return "–"  # as in a terminal: where nothing was measured, n says nothing
        return f"{number(value.mean, digits)} ({interval_words(value, digits)})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if is_number(value):
        return "–" if math.isnan(value) else number(float(value), digits)
    if isinstance(value, list | tuple):
        return ", ".join(show(item, digits) for item in value)
    return visible(str(value))


def interval_words(value: Interval, digits: int = 3) -> str:
    """`0.270 to 0.360, n = 120`."""
    from ..figures.text import number

    spread = "" if value.ci95 is None else f"{number(value.low, digits)} to {number(value.high, digits)}, "
    return f"{spread}n = {value.n}"
