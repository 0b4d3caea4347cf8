"""Text for figures: plotly shows text from models and data literally.

Plotly interprets some HTML in every title, tick and hover (`<b>`, `<a href>`), fills in `%{...}` templates and, if
MathJax is loaded, typesets `$...$`. Tokens can contain all three.
"""

from __future__ import annotations

import html
import math
import re
import textwrap

from .._util.text import visible


def escape(text: str) -> str:
    """Escape `text` so that plotly draws exactly these characters."""
    # Plotly does not know &quot;, and quotes need no escape outside a tag.
    return html.escape(visible(text), quote=False).replace("$", "&#36;").replace("%{", "&#37;{")


def unescape(text: str) -> str:
    """The plain text of a plotly title, on one line."""
    return html.unescape(re.sub(r"<[^>]*>", " ", text)).strip()


def readable_token(token: str, limit: int = 28) -> str:
    """A decoded token as a label: spaces at its ends become middle dots, so that `in` and ` in` differ."""
    token = visible(token.replace("\u2581", " "))
    core = token.strip(" ")
    if not core:
        return "·" * len(token) if token else "∅"
    left, right = len(token) - len(token.lstrip(" ")), len(token) - len(token.rstrip(" "))
    return clip("·" * left + core + "·" * right, limit)


def clip(text: str, limit: int) -> str:
    """At most `limit` characters; an ellipsis ends a cut text."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def wrap(text: str, width: int, lines: int = 3) -> list[str]:
    """`text` as at most `lines` escaped lines of `width` characters, for a title."""
    rows = textwrap.wrap(visible(text), width, max_lines=lines, placeholder=" …", break_on_hyphens=False)
    return [escape(row) for row in rows]


def number(value: float, digits: int = 3) -> str:
    """A value with `digits` decimals, or with two significant digits if these would show 0."""
    if not math.isfinite(value):
        return "n/a"
    if value != 0 and abs(value) < 0.5 * 10**-digits:
        return f"{value:.1e}".replace("-", "−")
    return f"{value:.{digits}f}".replace("-", "−")


def interval_line(low: float, high: float, digits: int = 3) -> str:
    """The hover line of a 95% interval; "no interval" for NaN."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return "no interval"
    return f"95% interval {number(low, digits)} to {number(high, digits)}"
