"""How a recipe's values are read: strictly, since a value that is taken for another changes a table without a word.

`where` is the file, or a part of it. Each reader raises BadFile for a value of another kind, with what to give instead.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from .._util.kinds import shown
from ..errors import BadFile

Value = TypeVar("Value")


def refuse(where: Path | str, key: str, value: Any, instead: str) -> NoReturn:
    """Say of a value what to give in its place.

    Raises:
        BadFile: always.
    """
    raise BadFile(f"{where}: {key} is {shown(value)}; give {instead}")


def whole(where: Path | str, key: str, value: Any, least: int = 0) -> int:
    """A whole number, which counts something."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        refuse(where, key, value, f"a whole number of at least {least}")
    return value


def number(where: Path | str, key: str, value: Any, least: float = -math.inf) -> float:
    """A finite number of at least `least`."""
    if not is_number(value) or value < least:
        refuse(where, key, value, "a number" if math.isinf(least) else f"a number of at least {least:g}")
    return float(value)


def is_number(value: Any) -> bool:
    """Whether it is a finite number; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300  # a whole number may be beyond what float() takes


def flag(where: Path | str, key: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        refuse(where, key, value, "true or false, without quotes")
    return value


def text(where: Path | str, key: str, value: Any, known: Collection[str] = ()) -> str:
    """A text that is not empty; one of `known` where these are given."""
    if not isinstance(value, str) or not value.strip():
        refuse(where, key, value, "a text, in quotes")
    if known and value not in known:
        raise BadFile(f"{where}: {key} has no {value!r}; there are {', '.join(known)}")
    return value


def texts(where: Path | str, key: str, value: Any, known: Collection[str] = (), least: int = 1) -> tuple[str, ...]:
    """A list of texts, each once and each of `known` where these are given."""
    if not isinstance(value, list) or len(value) < least or not all(isinstance(each, str) for each in value):
        refuse(where, key, value, 'a list of texts, as ["a", "b"]')
    return once(where, key, tuple(text(where, key, each, known) for each in value))


def span(where: Path | str, key: str, value: Any) -> tuple[int, int]:
    """The first and the last of some layers, counted from 1."""
    wanted = isinstance(value, list) and len(value) == 2 and all(type(layer) is int for layer in value)
    if not wanted or not 1 <= value[0] <= value[1]:
        refuse(where, key, value, "the first and the last layer, whole numbers from 1, as [1, 5]")
    return value[0], value[1]


def once(where: Path | str, key: str, values: tuple[Value, ...]) -> tuple[Value, ...]:
    """The values, where none is named twice."""
    for place, value in enumerate(values):
        if value in values[:place]:
            raise BadFile(f"{where}: {key} names {shown(value)} twice; name each once")
    return values
