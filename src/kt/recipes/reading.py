"""A recipe from its TOML: which table, on which models and data, by which methods, and what the paper has there.

Every key is checked when the file is read; a paper's figure must name a model, a place on the axis, and have a number
for every column.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import BadFile
from ..presets.symbols import METHOD_NAMES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent / "toml"
SUFFIX = ".toml"
KEYS = {
    "": ("summary", "paper", "place", "text", "notes", "data", "statistics", "columns", "models", "axis", "rows"),
    "data": ("facts", "url", "format", "edits", "seeds", "variant"),
    "statistics": ("corpus", "max_tokens"),
    "axis": ("name", "values"),
    "rows": ("label", "method", "unedited", "options", "paper"),
}
NEEDED = {
    "": ("summary", "paper", "place", "data", "columns", "models", "rows"),
    "data": ("facts", "edits"),
    "axis": ("name", "values"),
    "rows": ("label",),
}


class Cited(NamedTuple):
    """A figure as the paper prints it, and the half-width of its 95% interval where it prints one."""

    value: float
    half_width: float | None = None


@dataclass(frozen=True)
class Line:
    """A row of the paper's table.

    `method` is None where kt does not have it (the row then stands without a figure of ours), or where the row is of
    the `unedited` model. `cited`: by `model` or `model/place on the axis`, one figure a column.
    """

    label: str
    method: str | None
    unedited: bool
    options: Mapping[str, Any]
    cited: Mapping[str, tuple[Cited, ...]]


@dataclass(frozen=True)
class PaperRecipe:
    """One table or figure. `columns`: the paper's name of each, and the metric behind it (in percent, and so is
    fluency, as the papers print it). `axis`: what varies beside the method: `edits`, `alpha`, another option, or ``."""

    name: str
    summary: str
    paper: str
    place: str
    text: str
    notes: tuple[str, ...]
    facts: str
    url: str | None
    format: str | None
    edits: int
    seeds: tuple[int, ...]
    variant: str | None
    corpus: str
    max_tokens: int
    columns: Mapping[str, str]
    models: Mapping[str, str]
    axis: str
    values: tuple[float, ...]
    rows: tuple[Line, ...]

    @property
    def protocols(self) -> tuple[str, ...]:
        """The ways to ask that the columns need; a metric's name says which."""
        words = {word for metric in self.columns.values() for word in metric.split("_")}
        return tuple(way for way in ("tf", "gen", "prob", "wild", "ppl") if way in words)


def names() -> list[str]:
    """The recipes that are shipped."""
    return sorted(path.stem for path in FOLDER.glob(f"*{SUFFIX}"))


def read_recipe(name: str | Path) -> PaperRecipe:
    """A shipped recipe by its name, or one from a file that ends in .toml.

    Raises:
        BadFile: neither, not TOML, an unknown or missing key, or a figure that fits no model, place or column.
    """
    path = Path(name) if str(name).endswith(SUFFIX) else FOLDER / f"{name}{SUFFIX}"
    if not path.is_file():
        raise BadFile(f"no recipe {str(name)!r}; there are {', '.join(names())}, or name a file that ends in {SUFFIX}")
    try:
        held = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadFile(
            f"{path}: not TOML ({' '.join(str(error).split())}); write it as docs/recipes.md shows"
        ) from error
    try:
        return _recipe(path, held)
    except (TypeError, ValueError, AttributeError) as error:
        raise BadFile(f"{path}: a value is of the wrong kind ({error}); docs/recipes.md shows the form") from error


def _recipe(path: Path, held: Mapping[str, Any]) -> PaperRecipe:
    _check(path, "", held)
    data, axis = held["data"], held.get("axis", {})
    statistics = held.get("statistics", {})
    for name, table in (("data", data), ("axis", axis), ("statistics", statistics)):
        if table:
            _check(path, name, table)
    values = tuple(float(value) for value in axis.get("values", ()))
    models, columns = dict(held["models"]), dict(held["columns"])
    rows = tuple(_line(path, row, models, columns, values) for row in held["rows"])
    if not rows or not columns or not models:
        raise BadFile(f"{path}: [[rows]], [columns] and [models] each need at least one entry; add one")
    return PaperRecipe(
        name=path.stem,
        summary=held["summary"],
        paper=held["paper"],
        place=held["place"],
        text=held.get("text", ""),
        notes=tuple(held.get("notes", ())),
        facts=data["facts"],
        url=data.get("url"),
        format=data.get("format"),
        edits=int(data["edits"]),
        seeds=tuple(int(seed) for seed in data.get("seeds", (0,))),
        variant=data.get("variant"),
        corpus=statistics.get("corpus", "demo"),
        max_tokens=int(statistics.get("max_tokens", 100_000)),
        columns=columns,
        models=models,
        axis=axis.get("name", ""),
        values=values,
        rows=rows,
    )


def _line(
    path: Path,
    held: Mapping[str, Any],
    models: Mapping[str, str],
    columns: Mapping[str, str],
    values: tuple[float, ...],
) -> Line:
    _check(path, "rows", held)
    label, method = str(held["label"]), held.get("method")
    if method is not None and method not in METHOD_NAMES:
        raise BadFile(f"{path}: row {label!r}: no method {method!r}; there are {', '.join(METHOD_NAMES)}")
    cited = {}
    for key, numbers in held.get("paper", {}).items():
        model, _, at = key.partition("/")
        if model not in models or (at and float(at) not in values) or bool(at) != bool(values):
            raise BadFile(
                f"{path}: row {label!r}: {key!r} is no model of the recipe with a value of its axis; "
                "name one of [models], and a value where the recipe has an axis"
            )
        if len(numbers) != len(columns):
            raise BadFile(
                f"{path}: row {label!r}: {key!r} has {len(numbers)} figures for {len(columns)} columns; give one each"
            )
        cited[key] = tuple(Cited(*n) if isinstance(n, list) else Cited(float(n)) for n in numbers)
    return Line(label, method, bool(held.get("unedited", False)), dict(held.get("options", {})), cited)


def _check(path: Path, table: str, held: Mapping[str, Any]) -> None:
    where = f"[{table}] of {path}" if table else str(path)
    if stray := [key for key in held if key not in KEYS[table]]:
        raise BadFile(f"{where}: unknown key {stray[0]!r}; known are {', '.join(KEYS[table])}")
    if missing := [key for key in NEEDED.get(table, ()) if key not in held]:
        raise BadFile(f"{where}: {missing[0]!r} is missing; add it")
