"""A recipe from its TOML: the keys that all kinds share are checked and read here, the others by the kind.

Every key is checked when the file is read; a paper's figure must name a model, a place on the axis, and have a number
for every column.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._util.data import read_toml
from ..errors import BadFile
from .base import SHARED, Keys, Kind, PaperRecipe
from .kinds import DEFAULT, KINDS
from .values import refuse, text, texts

FOLDER = Path(__file__).parent / "toml"
SUFFIX = ".toml"
VALUES, LISTS = ("kind", "summary", "paper", "place", "text", "notes", "against"), ("rows", "claims")
"""The parts of a recipe that are no tables, and those that are lists of them."""
LABEL = re.compile(r"[A-Za-z0-9_+. -]{1,80}")
"""A model's label: its name in tables, and of the folder where its finished parts are kept."""


def names() -> list[str]:
    """The recipes that are shipped."""
    return sorted(path.stem for path in FOLDER.glob(f"*{SUFFIX}"))


def read_recipe(name: str | Path) -> PaperRecipe:
    """A shipped recipe by its name, or one from a file that ends in .toml.

    Args:
        name: one of `names()`, or a path.

    Returns:
        The recipe, checked, as an object of its kind.

    Raises:
        BadFile: neither, not TOML, an unknown or missing key, or a figure that fits no model, place or column.
    """
    path = Path(name) if str(name).endswith(SUFFIX) else FOLDER / f"{name}{SUFFIX}"
    if not path.is_file():
        raise BadFile(f"no recipe {str(name)!r}; there are {', '.join(names())}, or name a file that ends in {SUFFIX}")
    content = read_toml(path)
    kind = KINDS.get(str(content.get("kind", DEFAULT)))
    if kind is None:
        raise BadFile(f"{path}: no kind of recipe {str(content['kind'])[:40]!r}; there are {', '.join(KINDS)}")
    try:
        _check(path, content, kind)
        return kind.read(path, content, _shared(path, content))
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise BadFile(f"{path}: a value is of the wrong kind ({error}); docs/recipes.md shows the form") from error


def _check(path: Path, content: Mapping[str, Any], kind: Kind) -> None:
    """The form of every part, and every table's keys; of a list of tables those of each."""
    top = kind.tables[""]
    Keys((*SHARED.known, *top.known), (*SHARED.needed, *top.needed)).check(str(path), content)
    for name, given in content.items():
        if name in LISTS and not (isinstance(given, list) and all(isinstance(each, Mapping) for each in given)):
            refuse(path, name, given, f"a list of tables, each under [[{name}]]")
        if name not in (*LISTS, *VALUES) and not isinstance(given, Mapping):
            refuse(path, name, given, f"a table, under [{name}]")
    for name, keys in kind.tables.items():
        if name and name in content:
            tables = content[name] if isinstance(content[name], list) else [content[name]]
            for each in tables:
                keys.check(f"[{name}] of {path}", each)


def _shared(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    data, models = content["data"], dict(content["models"])
    if not models:
        raise BadFile(f"{path}: [models] needs at least one entry; add one")
    if wrong := [label for label in models if label.startswith(".") or not LABEL.fullmatch(label)]:
        raise BadFile(f"{path}: [models] {wrong[0]!r} names a folder of the run; write letters, digits, space and ._+-")
    if wrong := [label for label, model in models.items() if not isinstance(model, str)]:
        raise TypeError(f"model {wrong[0]} is no text; put it in quotes")
    about = {name: content.get(name, "") for name in ("summary", "paper", "place", "text")}
    if wrong := [name for name, given in about.items() if not isinstance(given, str)]:
        raise TypeError(f"{wrong[0]} is no text; put it in quotes")
    return {
        "name": path.stem,
        **about,
        "notes": texts(path, "notes", content.get("notes", []), least=0),
        "facts": text(path, "[data] facts", data["facts"]),
        **{key: None if key not in data else text(path, f"[data] {key}", data[key]) for key in ("url", "format")},
        "models": models,
    }
