"""Recipes that edit: the rows of the paper's table, each with its method, and the facts that are edited."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from .._util.kinds import shown
from ..editing.methods import METHODS, used_by
from ..editing.presets import OPTIONS, checked_settings
from ..errors import BadFile, KtError
from ..facts.fact import Fact
from .base import How, Keys, PaperRecipe, facts_of
from .values import flag, is_number, once, refuse, text, whole

Shown = TypeVar("Shown")
Edited = TypeVar("Edited", bound="EditedRecipe")

SMOKE_EDITS = (2, 3)
SMOKE_STEPS = {"v_num_grad_steps": 3, "num_steps": 3}
SMOKE_TOKENS = 5_000
OF_THE_RUN = ("method", "seed", "journal", "requests", "progress", "history")
"""Arguments of `kt.edit` that the recipe or its run gives, and a row's options may not."""
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
    def of(cls, where: str, key: str, content: Any) -> Cited:
        """From a number, or a list of both.

        Raises:
            BadFile: it is neither.
        """
        parts = content if isinstance(content, list) else [content]
        if not 1 <= len(parts) <= 2 or not all(map(is_number, parts)) or any(width < 0 for width in parts[1:]):
            refuse(where, key, content, "the paper's figure, a number, or [figure, half-width from 0]")
        return cls(*map(float, parts))


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
    seeds = read_seeds(path, data.get("seeds", [0]))
    if one_seed and len(seeds) != 1:
        raise BadFile(f"{path}: {one_seed}; give seeds one number")
    return {
        "n_facts": whole(path, "[data] edits", data["edits"], 1),
        "seeds": seeds,
        "variant": None if "variant" not in data else text(path, "[data] variant", data["variant"]),
        "corpus": text(path, "[statistics] corpus", statistics.get("corpus", "auto")),
        "max_tokens": whole(path, "[statistics] max_tokens", statistics.get("max_tokens", 100_000), 1),
    }


def read_seeds(path: Path, given: Any) -> tuple[int, ...]:
    """The seeds of [data].

    Raises:
        BadFile: none, a value that is no whole number, or one that is named twice.
    """
    if not isinstance(given, list):
        refuse(path, "[data] seeds", given, "a list of whole numbers, as [0, 1]")
    if not given:
        raise BadFile(f"{path}: [data] seeds is empty; give one or more, or leave it out")
    return once(path, "[data] seeds", tuple(whole(path, "[data] seeds", seed) for seed in given))


def read_rows(
    path: Path,
    content: Mapping[str, Any],
    width: int,
    read: Callable[[str, str, Any], Shown],
    places: Sequence[str] = (),
    what: str = "figures for {} columns",
) -> tuple[Line[Shown], ...]:
    """[[rows]]: each has `width` entries of the paper by model, or by model and place on the axis.

    Raises:
        BadFile: no rows, a label that two have, an unknown method, an option that it does not take, or an entry that
            fits no model, place or column.
    """
    if not content["rows"] or not width:
        raise BadFile(f"{path}: [[rows]] and its columns each need at least one entry; add one")
    rows = []
    for row in content["rows"]:
        label = text(path, "label of a row", row["label"])
        where = f"{path}: row {label!r}"
        cited = {}
        for key, entries in _table(where, "paper", row).items():
            model, _, at = key.partition("/")
            at = at if at in places else _place(at)
            if model not in content["models"] or (at and at not in places) or bool(at) != bool(places):
                raise BadFile(
                    f"{where}: {key!r} is no model of the recipe with a value of its axis; "
                    "name one of [models], and a value where the recipe has an axis"
                )
            if not isinstance(entries, list):
                refuse(where, f"paper of {key!r}", entries, f"a list of {what.format(width)}")
            if len(entries) != width:
                raise BadFile(f"{where}: {key!r} has {len(entries)} {what.format(width)}; give one each")
            key = f"{model}/{at}" if at else model
            if key in cited:
                raise BadFile(f"{where}: paper has {key!r} twice; leave one of them out")
            cited[key] = tuple(read(where, f"paper of {key!r}", entry) for entry in entries)
        rows.append(Line(label, *_edit_of(where, row), cited))
    once(path, "[[rows]] label", tuple(row.label for row in rows))
    return tuple(rows)


def _edit_of(where: str, row: Mapping[str, Any]) -> tuple[str | None, bool, dict[str, Any]]:
    """A row's method, whether it is of the unedited model, and the options.

    Raises:
        BadFile: an unknown method, one of the unedited model, or options that it does not take.
    """
    method, options = row.get("method"), dict(_table(where, "options", row))
    unedited = flag(where, "unedited", row.get("unedited", False))
    if method is not None and (not isinstance(method, str) or method not in METHODS):
        raise BadFile(f"{where}: no method {shown(method)}; there are {', '.join(METHODS)}")
    if unedited and method is not None:
        raise BadFile(f"{where}: method {method!r} and unedited = true are two rows; leave one of them out")
    if wrong := [name for name in OF_THE_RUN if name in options]:
        raise BadFile(f"{where}: options hold {wrong[0]!r}, which the recipe or its run gives; leave it out there")
    if method is not None:
        check_options(where, method, options)
    return method, unedited, options


def check_options(where: str, method: str, options: Mapping[str, Any]) -> None:
    """Refuse what a method does not take.

    Raises:
        BadFile: there is something.
    """
    try:
        settings = {name: value for name, value in options.items() if name not in OPTIONS}
        checked_settings(method, options.get("alpha"), **settings)
    except KtError as error:
        raise BadFile(f"{where}: {error}") from error


def _table(where: str, key: str, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A table of a row, empty where there is none."""
    table = row.get(key, {})
    if not isinstance(table, Mapping):
        refuse(where, key, table, "a table, as { name = value }")
    return table


def _place(at: str) -> str:
    """A place on the axis as labels have it: `0.10` is `0.1`."""
    try:
        return f"{float(at):g}"
    except ValueError:
        return at


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
