"""Text from models and data as it is shown: what a terminal or a browser would act on is written out instead.

An escape character can recolour a terminal, retitle or clear it; a mark of writing direction can make a line read as
another. Nothing of `kt` is imported here, so that every room can.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

_BREAKS = {"\n": "↵", "\r": "␍", "\t": "⇥"}
_ACTS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0 and C1 controls, marks of writing direction, line and paragraph separators, lone surrogates."""


def visible(text: str) -> str:
    """On one line: line breaks as arrows; control characters, lone surrogates and writing-direction marks as escapes.

    >>> visible("a\\x1b[31mb")
    'a\\\\u001b[31mb'
    """
    return _ACTS.sub(lambda found: _BREAKS.get(found[0]) or f"\\u{ord(found[0]):04x}", text)


def count(n: int, noun: str) -> str:
    """`1 fact`, `2 facts`."""
    return f"{n} {noun}{'s' * (n != 1)}"


def some_of(names: Sequence[str], most: int = 3, rest: str = " and {} more") -> str:
    """Names with commas, the first ones of many: `a, b, c and 2 more`."""
    return ", ".join(names[:most]) + (rest.format(len(names) - most) if len(names) > most else "")


def size_text(size: int) -> str:
    """Bytes as `1.5 MiB`."""
    unit, name = next((pair for pair in ((2**30, "GiB"), (2**20, "MiB")) if size >= pair[0]), (2**10, "KiB"))
    return f"{size / unit:.1f} {name}"


def without_folders(name: object) -> str:
    """A model's name as it is shown and handed on: of an absolute path, or of one from a home or a folder above, only
    the last part, which says nothing of the machine."""
    text = str(name)
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(text)
        if path.is_absolute() or path.parts[:1] in (("~",), ("..",)):
            return path.name
    return text


def words(given: str | Iterable[str]) -> list[str]:
    """Names as a list, or as one text with commas."""
    return [part.strip() for part in given.split(",")] if isinstance(given, str) else [str(name) for name in given]


def slug(name: str) -> str:
    """A name as that of a folder: letters, digits and `+.=_-`."""
    return re.sub(r"[^\w+.=-]+", "-", name).strip("-.")


def visible_lines(text: str) -> str:
    """The same with its line breaks kept."""
    return "\n".join(map(visible, text.split("\n")))


# Numbers as tables show them.


def cell(value: Any) -> str:
    """A table cell: probabilities and shares with three decimals, nothing for a missing value, texts made visible."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return "–" if value != value else f"{value:.3f}" if abs(value) >= 5e-4 or value == 0 else f"{value:.1e}"
    return visible_lines(str(value))


def interval(mean: float | None, ci95: Any) -> str:
    """`0.412 [0.39, 0.43]`."""
    if mean is None or mean != mean:
        return "–"
    if ci95 is None or any(v is None or v != v for v in ci95):
        return cell(float(mean))
    tiny = 0 < abs(mean) < 5e-4  # three decimals would show an interval of zeros, beside a mean outside it
    low, high = (cell(float(end)) if tiny else f"{round(end, 3) + 0.0:.3f}" for end in ci95)
    return f"{cell(float(mean))} [{low}, {high}]"


def runs_of(layers: Sequence[int], between: str = ", ") -> str:
    """Layers in words: `0, 2-5`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return between.join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
