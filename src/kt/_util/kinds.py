"""The kinds of values that public functions take: a value that would be taken for another, or fail deep inside, is
refused in one line where it is given."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache, wraps
from inspect import signature, unwrap
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, ParamSpec, TypeVar

from ..errors import KtError

P = ParamSpec("P")
T = TypeVar("T")
Wanted = tuple[tuple[type, ...], str]
"""The types of a value, and what to give instead of others."""
COUNT: Wanted = ((Integral,), "a whole number")
TEXT: Wanted = ((str,), "a text")
TEXT_OR_NONE: Wanted = ((str, NoneType), "a text, or None")
YES_OR_NO: Wanted = ((bool, NoneType), "True, False, or None")
NAMES: Wanted = ((str, Sequence), "a list of names")
NAMES_OR_NONE: Wanted = ((str, Sequence, NoneType), "a list of names, or None")
A_RUN: Wanted = ((str, os.PathLike, Sequence), "a run folder, or a list of them")
A_FILE: Wanted = ((str, os.PathLike), "a file's name, as text or a Path")


def require_kinds(values: Mapping[str, Any], kinds: Mapping[str, Wanted], error: type[KtError] = KtError) -> None:
    """Refuse values of other kinds.

    Raises:
        KtError: one is of none of its types; True and False are no numbers, and a seed is not below 0.
    """
    for name, (types, instead) in kinds.items():
        value = values[name]
        other = isinstance(value, bool) and bool not in types
        other |= isinstance(value, str) and str not in types  # a text is a sequence too
        if other or not isinstance(value, types):
            raise error(f"{name} is {shown(value)}; give {instead}")
        if name == "seed" and isinstance(value, Integral) and value < 0:
            raise error(f"seed {value} is below 0; give a whole number from 0")


def shown(value: Any) -> str:
    """A value in a message of one line: of anything but texts, numbers and lists of them its type."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    plain = isinstance(value, str | int | float | list | tuple | NoneType)
    text = repr(value)[:60] if plain else f"an object of type {type(value).__name__}"
    return " ".join(text.split())


def takes(**kinds: Wanted) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A function whose arguments are of the kinds that their annotations name.

    Args:
        kinds: by argument, in place of its annotation.

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
            annotated = annotated_kinds(function)
            wanted = {name: kind.wanted for name, kind in annotated.items()} | kinds
            require_kinds(given, {name: kind for name, kind in wanted.items() if name in given})
            for name, kind in annotated.items():
                if name in given and kind.each is not None:
                    _require_each(name, given[name], kind.each, wanted[name][1])
            return function(*args, **kwargs)

        return called

    return around


class Annotated(NamedTuple):
    """What an annotation says: the types of a value with what to give, and the types of its elements."""

    wanted: Wanted
    each: tuple[type, ...] | None = None


PLAIN: dict[str, tuple[type, str, str]] = {
    "int": (Integral, "a whole number", "whole numbers"),
    "float": (Real, "a number", "numbers"),
    "str": (str, "a text", "texts"),
    "bool": (bool, "True or False", "True and False"),
    "Path": (os.PathLike, "a Path", "Paths"),
    "PathLike": (os.PathLike, "a Path", "Paths"),
    "Mapping": (Mapping, "a mapping", "mappings"),
    "Iterable": (Iterable, "a list", "lists"),
    "Sequence": (Sequence, "a list", "lists"),
    "Callable": (Callable, "a function", "functions"),  # type: ignore[dict-item]  # isinstance knows it
    "Progress": (Callable, "a function of what is done and of how many", "functions"),  # type: ignore[dict-item]
    "Stage": (Callable, "a function that opens a stage by its name", "functions"),  # type: ignore[dict-item]
}
"""By name in an annotation: the type, what one is called, and what several are called."""


@cache
def annotated_kinds(function: Callable[..., Any]) -> dict[str, Annotated]:
    """Of each argument whose annotation is a union of plain types and classes; of others nothing is known."""
    inner = unwrap(function)
    found = {name: _annotated(str(text), vars(sys.modules[inner.__module__]))
             for name, text in inner.__annotations__.items() if name != "return"}  # fmt: skip
    return {name: kind for name, kind in found.items() if kind is not None}


def _annotated(text: str, names: Mapping[str, Any]) -> Annotated | None:
    types: list[type] = []
    phrases: list[str] = []
    each: tuple[type, ...] | None = ()
    optional = False
    for node in _alternatives(ast.parse(text, mode="eval").body):
        name = _name(node)
        if name == "None":
            optional = True
            continue
        if (known := _type(name, names)) is None:
            return None
        kind, one, _ = known
        types += _siblings(kind)
        if kind in (Sequence, Iterable) and isinstance(node, ast.Subscript):
            within = [_type(_name(part), names) for part in _alternatives(node.slice)]
            whole = [w for w in within if w is not None]
            if len(whole) == len(within):
                each = None if each is None else (*each, *(t for w in whole for t in _siblings(w[0])))
                one = f"a list of {' or '.join(dict.fromkeys(w[2] for w in whole))}"
            else:
                each = None
        phrases.append(one)
    if str in types and os.PathLike in types:
        phrases = ["a file's name", *(phrase for phrase in phrases if phrase not in ("a text", "a Path"))]
    said = " or ".join(dict.fromkeys(phrases)) + (", or None" if optional else "")
    return Annotated((tuple(types) + ((NoneType,) if optional else ()), said), each or None)


def _alternatives(node: ast.expr) -> list[ast.expr]:
    """The parts of `a | b | c`."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _alternatives(node.left) + _alternatives(node.right)
    return [node]


def _name(node: ast.expr) -> str:
    """The name of a type without its parameters."""
    return ast.unparse(node.value if isinstance(node, ast.Subscript) else node)


def _type(name: str, names: Mapping[str, Any]) -> tuple[type, str, str] | None:
    """The type of a name in an annotation; None of an alias, a protocol, and what is not a class."""
    module, _, own = name.rpartition(".")
    if own in PLAIN:
        return PLAIN[own]
    if module:
        kind = getattr(names.get(module), own, None)
    else:
        kind = names[name] if name in names else _imported_for_types(name)
    if not isinstance(kind, type) or kind is Any or getattr(kind, "_is_protocol", False):
        return None
    one = "the model that kt.load returns" if name == "TracedModel" else f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
    return kind, one, f"{name}s"


def _imported_for_types(name: str) -> Any:
    """The one class of this package that has a name which a module imports for type checkers alone; None where there
    are several of that name, or none is loaded."""
    package = __name__.partition(".")[0]
    held = [vars(module).get(name) for key, module in sys.modules.items() if key.startswith(f"{package}.") and module]
    found = {id(value): value for value in held if value is not None}
    return next(iter(found.values())) if len(found) == 1 else None


def _siblings(kind: type) -> tuple[type, ...]:
    """The type with numpy's of the same meaning."""
    import numpy as np

    same: dict[type, type] = {bool: np.bool_, Sequence: np.ndarray}
    return (kind, same[kind]) if kind in same else (kind,)


def _require_each(name: str, value: Any, types: tuple[type, ...], instead: str) -> None:
    for each in value if isinstance(value, Sequence) and not isinstance(value, str) else ():
        if not isinstance(each, types) or (isinstance(each, bool) and bool not in types):
            raise KtError(f"{name} holds {shown(each)}; give {instead}")


MOST = 12
"""Names in a message."""


def require_options(options: Iterable[str], known: Iterable[str], of: str) -> None:
    """Refuse options that a function does not hand on, before it works.

    Raises:
        KtError: one is not among `known`.
    """
    known = list(known)
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, 1)
            others = f"{', '.join(known[:MOST])}{' and others' if len(known) > MOST else ''}"
            rest = f"did you mean {near[0]}?" if near else f"it takes {others}"
            raise KtError(f"{of} takes no {name}; {rest}")


def as_path(file: str | os.PathLike[str]) -> Path:
    """The path of a file that is named by text or a path.

    Raises:
        KtError: it is named by something else.
    """
    require_kinds({"file": file}, {"file": A_FILE})
    return Path(file)
