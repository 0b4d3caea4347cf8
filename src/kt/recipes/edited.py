"""Recipes that edit: the rows of the paper's table, each with its method, and the facts that are edited."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from ..editing.methods import METHODS, used_by
from ..editing.presets import OPTIONS, checked_settings
from ..errors import BadFile, KtError
from ..facts.fact import Fact
from .base import How, Keys, PaperRecipe, facts_of, whole

Shown = TypeVar("Shown")
Edited = TypeVar("Edited", bound="EditedRecipe")

SMOKE_EDITS = (2, 3)
SMOKE_STEPS = {"v_num_grad_steps": 3, "num_steps": 3}
SMOKE_TOKENS = 5_000
OF_SIZE = ("layers", "mom2_", "nullspace", "L2")
"""Options that are in units of one model, and so are left to the demo model's own preset in a smoke run."""

TABLES = {
    "data": Keys(("facts", "url", "format", "edits", "seeds", "variant"), ("facts", "edits")),
    "statistics": Keys(("corpus", "max_tokens")),
    "rows": Keys(("label", "method", "unedited", "options", "paper"), ("label",)),
}


class Cited(NamedTuple):
    """A figure as the paper prints it, and the half-width of its 95% interval where it prints one."""

    value: float
    half_width: float | None = None

    @classmethod
    def of(cls, content: Any) -> Cited:
        """From a number, or a list of both."""
        return cls(*map(float, content)) if isinstance(content, list) else cls(float(content))


@dataclass(frozen=True)
class Line(Generic[Shown]):
    """A row of the paper's table.

    `method` is None where kt does not have it (the row then stands without a figure of ours), or where the row is of
    the `unedited` model. `cited`: by `model` or `model/place on the axis`, one figure (or text) a column.
    """

    label: str
    method: str | None
    unedited: bool
    options: Mapping[str, Any]
    cited: Mapping[str, tuple[Shown, ...]]


@dataclass(frozen=True, kw_only=True)
class EditedRecipe(PaperRecipe):
    """A recipe that edits `n_facts` facts in one batch, by several methods."""

    seeds: tuple[int, ...]
    variant: str | None
    corpus: str
    max_tokens: int
    rows: tuple[Line[Any], ...]

    @property
    def edits(self) -> int:
        assert self.n_facts is not None, "the key `edits` is needed"
        return self.n_facts

    def smoked(self: Edited) -> Edited:
        small = {"n_facts": max(SMOKE_EDITS), "variant": None, "corpus": "demo", "max_tokens": SMOKE_TOKENS}
        return replace(super().smoked(), seeds=self.seeds[:1], **small)  # type: ignore[arg-type]

    def seeded(self: Edited, seed: int | None) -> Edited:
        return self if seed is None else replace(self, seeds=(seed,))

    def drawn_with(self) -> Sequence[int]:
        return self.seeds

    def options_of(self, line: Line[Any], smoke: bool) -> dict[str, Any]:
        """The arguments of `kt.edit` for a row that has a method."""
        options = dict(line.options)
        if self.variant is not None:
            options["variant"] = self.variant
        if smoke:
            options = {n: v for n, v in options.items() if not n.startswith(OF_SIZE)}
            options |= used_by(str(line.method), SMOKE_STEPS)
            if METHODS[str(line.method)].writes_attention:
                options.setdefault("alpha", 0.3)  # a trace of three facts would take longer than the rest
        return {"method": line.method, **options}


def read_edited(path: Path, content: Mapping[str, Any], one_seed: str = "") -> dict[str, Any]:
    """[data] and [statistics] as arguments of an `EditedRecipe`; `one_seed` says why a kind takes no more than one."""
    data, statistics = content["data"], content.get("statistics", {})
    seeds = tuple(whole(path, "[data] seeds", seed) for seed in data.get("seeds", (0,)))
    if not seeds:
        raise BadFile(f"{path}: [data] seeds is empty; give one or more, or leave it out")
    if one_seed and len(seeds) != 1:
        raise BadFile(f"{path}: {one_seed}; give seeds one number")
    return {
        "n_facts": whole(path, "[data] edits", data["edits"], 1),
        "seeds": seeds,
        "variant": data.get("variant"),
        "corpus": statistics.get("corpus", "auto"),
        "max_tokens": whole(path, "[statistics] max_tokens", statistics.get("max_tokens", 100_000), 1),
    }


def read_rows(
    path: Path,
    content: Mapping[str, Any],
    width: int,
    shown: Callable[[Any], Shown],
    values: tuple[float, ...] = (),
    what: str = "figures for {} columns",
) -> tuple[Line[Shown], ...]:
    """[[rows]]: each has `width` entries of the paper by model, or by model and place on the axis.

    Raises:
        BadFile: no rows, an unknown method, or an entry that fits no model, place or column.
    """
    if not content["rows"] or not width:
        raise BadFile(f"{path}: [[rows]] and its columns each need at least one entry; add one")
    rows = []
    for row in content["rows"]:
        label, method = str(row["label"]), row.get("method")
        if method is not None and method not in METHODS:
            raise BadFile(f"{path}: row {label!r}: no method {method!r}; there are {', '.join(METHODS)}")
        options = dict(row.get("options", {}))
        if method is not None:
            settings = {name: value for name, value in options.items() if name not in OPTIONS}
            try:
                checked_settings(method, **settings)
            except KtError as error:
                raise BadFile(f"{path}: row {label!r}: {error}") from error
        cited = {}
        for key, entries in row.get("paper", {}).items():
            model, _, at = key.partition("/")
            if model not in content["models"] or (at and float(at) not in values) or bool(at) != bool(values):
                raise BadFile(
                    f"{path}: row {label!r}: {key!r} is no model of the recipe with a value of its axis; "
                    "name one of [models], and a value where the recipe has an axis"
                )
            if len(entries) != width:
                given = f"{len(entries)} {what.format(width)}"
                raise BadFile(f"{path}: row {label!r}: {key!r} has {given}; give one each")
            cited[key] = tuple(map(shown, entries))
        rows.append(Line(label, method, bool(row.get("unedited", False)), options, cited))
    return tuple(rows)


def edited_facts(recipe: EditedRecipe, how: How) -> list[Fact]:
    """The recipe's number of facts: the first ones of a file, as the papers take them.

    Raises:
        BadFile: the recipe's data has to be fetched by hand.
        KtError: there are too few.
    """
    facts = editable(recipe, how)
    if len(facts) < recipe.edits:
        raise KtError(
            f"recipe {recipe.name} edits {recipe.edits} facts, and there are {len(facts)}; give more facts, or fewer "
            "edits with --limit"
        )
    return facts[: recipe.edits]


def editable(recipe: EditedRecipe, how: How) -> list[Fact]:
    """All of the recipe's facts that can stand in one batch; in a smoke run a few that ask everything."""
    from ..demo.loop import spread
    from ..experiments import distinct

    given = facts_of(recipe, how)
    if how.smoke and how.facts is None:
        given = spread([fact for fact in given if fact.hops and fact.neighbours], recipe.edits)
    return distinct(given)
