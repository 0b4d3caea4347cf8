"""The kinds of values that public functions take: a value that would be taken for another, or fail deep inside, is
refused in one line where it is given."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from inspect import signature
from numbers import Integral
from pathlib import Path
from types import NoneType
from typing import Any, ParamSpec, TypeVar

from ..errors import KtError

P = ParamSpec("P")
T = TypeVar("T")
Wanted = tuple[tuple[type, ...], str]
"""The types of a value, and what to give instead of others."""
COUNT: Wanted = ((Integral,), "a whole number")
TEXT: Wanted = ((str,), "a text")
TEXT_OR_NONE: Wanted = ((str, NoneType), "a text, or None")
YES_OR_NO: Wanted = ((bool, NoneType), "True, False, or None")
NAMES: Wanted = ((str, Sequence, NoneType), "a list of names")
A_FILE: Wanted = ((str, os.PathLike), "a file's name, as text or a Path")


def require_kinds(values: Mapping[str, Any], kinds: Mapping[str, Wanted], error: type[KtError] = KtError) -> None:
    """Refuse values of other kinds.

    Raises:
        KtError: one is of none of its types; True and False are no numbers.
    """
    for name, (types, instead) in kinds.items():
        value = values[name]
        other = isinstance(value, bool) and bool not in types
        other |= isinstance(value, str) and str not in types  # a text is a sequence too
        if other or not isinstance(value, types):
            raise error(f"{name} is {shown(value)}; give {instead}")


def shown(value: Any) -> str:
    """A value in a message of one line: of anything but texts, numbers and lists of them its type."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    plain = isinstance(value, str | int | float | list | tuple | NoneType)
    text = repr(value)[:60] if plain else f"an object of type {type(value).__name__}"
    return " ".join(text.split())


def takes(**kinds: Wanted) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A function whose arguments of these names are of these kinds, where they are given.

    Raises:
        KtError: when it is called with another.
    """

    def around(function: Callable[P, T]) -> Callable[P, T]:
        form = signature(function)

        @wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                given = form.bind_partial(*args, **kwargs).arguments
            except TypeError:  # of too many arguments, or unknown ones: the call itself says it in Python's words
                given = {}
            require_kinds(given, {name: kind for name, kind in kinds.items() if name in given})
            return function(*args, **kwargs)

        return called

    return around


def as_path(file: str | os.PathLike[str]) -> Path:
    """The path of a file that is named by text or a path.

    Raises:
        KtError: it is named by something else.
    """
    require_kinds({"file": file}, {"file": A_FILE})
    return Path(file)
