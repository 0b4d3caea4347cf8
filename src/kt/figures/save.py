"""Figures to files: HTML and JSON by plotly alone, PNG and SVG through a browser that kaleido finds.

An HTML file contains plotly.js: it opens offline, its policy forbids all other sources, and the same figure gives the
same bytes. PNG and SVG depend on the browser's fonts.
"""

from __future__ import annotations

import asyncio
import html as markup
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path

import plotly.graph_objects as go

from .._util.files import write_named
from ..errors import WorkFailed
from . import theme
from .text import unescape

Target = str | PathLike[str] | None

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""Content security policy of every page: only the file's own content."""

CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "displayModeBar": "hover",
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
    "toImageButtonOptions": {"format": "svg", "filename": "kt-figure"},
    "showSendToCloud": False,
}

_SOFTWARE = b"tEXtSoftware\0kt"
MARKS = {
    "png": struct.pack(">I", len(_SOFTWARE) - 4) + _SOFTWARE + struct.pack(">I", zlib.crc32(_SOFTWARE)),
    "svg": b"<!-- Generator: kt -->",
}
"""What every picture that kt draws says of its origin: a text chunk behind a PNG's header, a comment in an SVG."""
_HEADER = 33
"""Bytes of a PNG before its second chunk."""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="kt">
<title>{title}</title>
<style>body {{ margin: 0 auto; padding: 8px; max-width: 1100px; background: {paper}; }}</style>
<script>{library}</script>
</head>
<body>
{figure}
</body>
</html>
"""


def write_figure(
    figure: go.Figure,
    *,
    html: Target = None,
    png: Target = None,
    svg: Target = None,
    json: Target = None,
    div_id: str = "kt-figure",
    width: int = theme.WIDTH,
    scale: float = 2,
) -> list[Path]:
    """Write the figure to each given file, atomically.

    Args:
        div_id: the id of the figure's HTML element.
        width: pixels of PNG and SVG.
        scale: pixel density of PNG.

    Returns:
        The written paths.

    Raises:
        NotWritable: a file cannot be written.
        WorkFailed: PNG or SVG without a working browser.
    """
    written: list[Path] = []
    if html is not None:
        written.append(write_named(html, figure_page(figure, div_id)))
    if json is not None:
        written.append(write_named(json, figure.to_json() + "\n"))
    targets = [(format, path) for format, path in (("png", png), ("svg", svg)) if path is not None]
    pictures = images([(figure, format) for format, _ in targets], width, scale)
    return written + [write_named(path, picture) for (_, path), picture in zip(targets, pictures, strict=True)]


def figure_html(figure: go.Figure, div_id: str, inert: bool = False) -> str:
    """The figure as an HTML fragment for a page that includes plotly.js; `inert`: the page runs its script itself."""
    html = figure.to_html(CONFIG, include_plotlyjs=False, full_html=False, div_id=div_id)
    return html.replace("<script>", '<script type="text/plain">', 1) if inert else html


def figure_page(figure: go.Figure, div_id: str = "kt-figure") -> str:
    """The figure as an HTML page that opens offline."""
    title = unescape(figure.layout.title.text or "") or "kt figure"
    return _PAGE.format(
        policy=POLICY,
        title=markup.escape(title),
        paper=theme.PAPER,
        library=plotly_library(),
        figure=figure_html(figure, div_id),
    )


def plotly_library() -> str:
    """The source of plotly.js, for a script element."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def images(pictures: Sequence[tuple[go.Figure, str]], width: int = theme.WIDTH, scale: float = 2) -> list[bytes]:
    """Draw each (figure, "png" or "svg") as bytes. One browser draws all, since starting it takes most of the time.

    Raises:
        WorkFailed: no browser was found, or it failed.
    """
    if not pictures:
        return []
    from kaleido.errors import (
        BrowserClosedError,
        BrowserFailedError,
        ChromeNotFoundError,
        JavascriptError,
        KaleidoError,
    )

    formats = " and ".join(sorted({format.upper() for _, format in pictures}))
    try:
        # In a new thread, since a notebook already runs an event loop in this one.
        with ThreadPoolExecutor(1) as worker:
            drawn = worker.submit(lambda: asyncio.run(_draw(pictures, width, scale))).result()
            return [_marked(picture, format) for picture, (_, format) in zip(drawn, pictures, strict=True)]
    except ChromeNotFoundError:
        raise WorkFailed(
            f"{formats} output needs a browser and none was found: install Chromium (`apt install chromium`, or "
            "`plotly_get_chrome`), or write HTML or JSON instead"
        ) from None
    except (BrowserClosedError, BrowserFailedError, JavascriptError, KaleidoError, TimeoutError) as error:
        raise WorkFailed(
            f"the browser could not draw {formats} ({type(error).__name__}): check that "
            "`chromium --headless --version` works, or write HTML or JSON instead"
        ) from error


def _marked(picture: bytes, format: str) -> bytes:
    """The picture with its origin."""
    at = _HEADER if format == "png" else picture.index(b">", picture.index(b"<svg")) + 1
    return picture[:at] + MARKS[format] + picture[at:]


def drew(path: Path) -> bool:
    """Whether a file is a PNG or an SVG that kt drew (an older kt said nothing of it)."""
    with path.open("rb") as file:
        head = file.read(1 << 12)
    return head[_HEADER:].startswith(MARKS["png"]) or (head.startswith(b"<svg") and MARKS["svg"] in head)


async def _draw(pictures: Sequence[tuple[go.Figure, str]], width: int, scale: float) -> list[bytes]:
    from kaleido import Kaleido

    # Without mathjax=False kaleido would fetch MathJax from the network, and typeset a token such as $x$. By default it
    # runs Chromium without the sandbox, so this also works as root.
    async with Kaleido(n=1, mathjax=False) as browser:
        files = []
        for figure, format in pictures:
            size = {"width": width, "height": figure.layout.height, "scale": scale if format == "png" else 1}
            files.append(await browser.calc_fig(figure.to_dict(), opts={"format": format, **size}))
        return files
