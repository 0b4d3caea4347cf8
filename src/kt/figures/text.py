"""Text for figures: what comes from models and data is shown as it is, and never interpreted.

Plotly reads a small HTML in every title, tick and hover (`<b>`, `<a href>`), fills in `%{...}` templates and, where
MathJax is loaded, typesets `$...$`. Tokens can contain all three.
"""

from __future__ import annotations

import html
import math
import re
import textwrap

from .._util.text import visible


def escape(text: str) -> str:
    """`text` so that plotly draws exactly these characters."""
    # Plotly knows numeric entities but not &quot;, and quotes mean nothing outside a tag.
    return html.escape(visible(text), quote=False).replace("$", "&#36;").replace("%{", "&#37;{")


def unescape(text: str) -> str:
    """The plain text of a plotly title, on one line."""
    return html.unescape(re.sub(r"<[^>]*>", " ", text)).strip()


def readable_token(token: str, limit: int = 28) -> str:
    """A decoded token for a label: spaces at its ends as middle dots, so that `in` and ` in` differ."""
    token = visible(token.replace("\u2581", " "))
    core = token.strip(" ")
    if not core:
        return "·" * len(token) if token else "∅"
    left, right = len(token) - len(token.lstrip(" ")), len(token) - len(token.rstrip(" "))
    return clip("·" * left + core + "·" * right, limit)


def clip(text: str, limit: int) -> str:
    """At most `limit` characters, the last one an ellipsis where something is missing."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def wrap(text: str, width: int, lines: int = 3) -> list[str]:
    """`text` as at most `lines` escaped lines of `width` characters, for a title."""
    rows = textwrap.wrap(visible(text), width, max_lines=lines, placeholder=" …", break_on_hyphens=False)
    return [escape(row) for row in rows]


def number(value: float, digits: int = 3) -> str:
    """A value to `digits` decimals, or two significant ones where it is smaller than that can show."""
    if not math.isfinite(value):
        return "n/a"
    if value != 0 and abs(value) < 0.5 * 10**-digits:
        return f"{value:.1e}".replace("-", "−")
    return f"{value:.{digits}f}".replace("-", "−")


def interval_line(low: float, high: float, digits: int = 3) -> str:
    """The hover line for a 95% interval, which says so where there is none."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return "no interval"
    return f"95% interval {number(low, digits)} to {number(high, digits)}"
