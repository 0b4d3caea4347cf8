"""The parts of every recipe: a name, its place in a paper, data and models; and the arguments of a run (`How`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, TypeVar

from .._util.kinds import shown
from .._util.progress import Stage
from ..errors import BadFile, KtError
from ..facts.fact import Fact

if TYPE_CHECKING:
    from ..model.model import TracedModel
    from .result import RecipeRun


Recipe = TypeVar("Recipe", bound="PaperRecipe")
Value = TypeVar("Value")


class Keys(NamedTuple):
    """The keys that a table of a TOML may have, and those that it must have."""

    known: tuple[str, ...]
    needed: tuple[str, ...] = ()

    def check(self, where: str, table: Mapping[str, Any]) -> None:
        """Refuse a stray key, then a missing one.

        Raises:
            BadFile: there is one.
        """
        if stray := [key for key in table if key not in self.known]:
            raise BadFile(f"{where}: unknown key {stray[0]!r}; known are {', '.join(self.known)}")
        if missing := [key for key in self.needed if key not in table]:
            raise BadFile(f"{where}: {missing[0]!r} is missing; add it")


@dataclass(frozen=True, kw_only=True)
class PaperRecipe:
    """One table or figure. `n_facts`: how many facts it takes of its data, None for all; `models`: label -> id.

    `takes` names the arguments of `run_recipe` that mean something for this kind and nothing for others.
    """

    kind: ClassVar[str]
    takes: ClassVar[frozenset[str]] = frozenset()

    name: str
    summary: str
    paper: str
    place: str
    text: str
    notes: tuple[str, ...]
    facts: str
    url: str | None
    format: str | None
    n_facts: int | None
    models: Mapping[str, str]

    def limited(self: Recipe, limit: int | None) -> Recipe:
        """The recipe with no more than `limit` facts."""
        if limit is None or (self.n_facts is not None and limit >= self.n_facts):
            return self
        return replace(self, n_facts=limit)

    def seeded(self: Recipe, seed: int | None) -> Recipe:
        """The recipe with this seed in place of its own; each kind says where it goes."""
        raise NotImplementedError

    def drawn_with(self) -> Sequence[int]:
        """The seeds that everything it draws comes from."""
        raise NotImplementedError

    def smoked(self: Recipe) -> Recipe:
        """The recipe on the demo model and demo facts; a kind takes away more."""
        label = next(iter(self.models))
        return replace(self, facts="demo", url=None, format=None, models={label: "demo"})


@dataclass(frozen=True)
class How:
    """The checked arguments of `run_recipe` beside the recipe; `models` are those that run, label -> id."""

    load: Callable[[str], TracedModel]
    facts: Sequence[Fact] | None
    models: Mapping[str, str]
    smoke: bool = False
    folder: Path | None = None
    resume: bool = False
    batch_size: int | str = "auto"
    corpus: str | None = None
    statistics: str | Path | None = None
    sets: str | Path | None = None
    only: Sequence[str] | None = None
    stage: Stage = lambda what: nullcontext()

    def shown(self, label: str) -> str:
        """A model's name in tables."""
        return f"demo, not {label}" if self.smoke else label

    def place(self, label: str) -> Path | None:
        """The folder of a model's finished parts while the recipe runs."""
        return None if self.folder is None else self.folder / label

    def goes_on(self, label: str) -> bool:
        """Whether an interrupted run can be resumed."""
        folder = self.place(label)
        return self.resume and folder is not None and (folder / "settings.json").exists()


class Kind(NamedTuple):
    """A kind of recipe: its keys by table (`` is the top, beside `SHARED`), how one is read, and how it is run."""

    tables: Mapping[str, Keys]
    read: Callable[[Path, Mapping[str, Any], Mapping[str, Any]], PaperRecipe]
    run: Callable[[Any, How], RecipeRun]


# The readers of values. `where` is the file, or a part of it; each raises BadFile for a value of another kind.


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


SHARED = Keys(
    ("kind", "summary", "paper", "place", "text", "notes", "data", "models"),
    ("summary", "paper", "place", "data", "models"),
)


def refuse_untaken(recipe: PaperRecipe, **given: Any) -> None:
    """Refuse an argument that this kind of recipe does not take, before any work.

    Raises:
        KtError: there is one.
    """
    for name, value in given.items():
        if value not in (None, False) and name not in recipe.takes:
            raise KtError(f"recipe {recipe.name} is of kind {recipe.kind}, which has no use for {name}; leave it out")


def facts_of(recipe: PaperRecipe, how: How, limit: int | None = None) -> list[Fact]:
    """The facts given, or the recipe's own; at most `limit`.

    Raises:
        BadFile: the recipe's data has to be fetched by hand.
    """
    from ..facts.load import load_facts

    if how.facts is not None:
        return list(how.facts)[:limit]
    if recipe.url is not None and not Path(recipe.facts).is_file():
        raise BadFile(f"recipe {recipe.name} needs {recipe.facts}; fetch {recipe.url} and give it with --facts")
    return load_facts(recipe.facts, limit, format=recipe.format)
