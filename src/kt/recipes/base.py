"""The parts of every recipe: a name, its place in a paper, data and models; and the arguments of a run (`How`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from .._util.progress import Stage
from ..errors import BadFile, KtError
from ..facts.fact import Fact

if TYPE_CHECKING:
    from ..model.model import TracedModel
    from .result import RecipeRun


Recipe = TypeVar("Recipe", bound="PaperRecipe")


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
    """One table or figure. `n_facts`: how many facts it takes of its data, None for all; `models`: label -> id;
    `seeds`: everything that is drawn by chance comes from them.

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
    seeds: tuple[int, ...] = (0,)

    def limited(self: Recipe, limit: int | None) -> Recipe:
        """The recipe with no more than `limit` facts."""
        if limit is None or (self.n_facts is not None and limit >= self.n_facts):
            return self
        return replace(self, n_facts=limit)

    def seeded(self: Recipe, seed: int | None) -> Recipe:
        """The recipe with this seed in place of its own."""
        return self if seed is None else replace(self, seeds=(seed,))

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
