"""The recipe that compares kt's methods: all of them, or those of `--only`, at the same numbers of edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._util.text import slug
from ..editing.config import one_of
from ..editing.methods import METHODS
from ..errors import BadFile, WorkFailed
from ..report import Table
from .base import How, Keys, Kind
from .edited import TABLES, EditedRecipe, edited_facts, read_edited, read_rows
from .result import RecipeRun
from .values import once, refuse, text, texts, whole

if TYPE_CHECKING:
    from ..experiments.methods_table import MethodsTable


@dataclass(frozen=True, kw_only=True)
class MethodsRecipe(EditedRecipe):
    """`batches` and `steps` are the numbers of edits in one solve and in groups of `step`; one edit is measured on
    `singles` facts, each by itself, and text is generated about `fluency` of them."""

    kind = "methods"
    takes = frozenset({"corpus", "statistics", "resume", "only"})

    batches: tuple[int, ...]
    steps: tuple[int, ...]
    step: int
    singles: int
    fluency: int
    against: tuple[str, ...]
    tokens: int | None

    def limited(self, limit: int | None) -> MethodsRecipe:
        """Only the numbers of edits up to the limit; where all are beyond it, the limit itself."""
        fewer = super().limited(limit)
        if fewer is self or limit is None:
            return self
        batches, steps = (tuple(n for n in sizes if n <= limit) for sizes in (self.batches, self.steps))
        if not batches and self.batches:
            batches = (limit,)
        elif not batches and not steps and self.steps:
            steps = (limit,)
        return replace(fewer, batches=batches, steps=steps, singles=min(self.singles, limit))

    def named(self, names: Sequence[str]) -> list[str]:
        """The names, where each is a row's.

        Raises:
            KtError: there is no such row.
        """
        return [one_of(name, [line.label for line in self.rows], "only") for name in names]

    def smoked(self) -> MethodsRecipe:
        """Two facts alone, three in a batch, four in steps."""
        small = replace(super().smoked(), n_facts=4)
        return replace(small, batches=(3,), steps=(4,), step=2, singles=2, fluency=1, tokens=small.max_tokens)


@dataclass(frozen=True)
class MethodsRun(RecipeRun):
    """A table a model."""

    recipe: MethodsRecipe
    found: Mapping[str, MethodsTable]

    @property
    def n_facts(self) -> int:
        return self.recipe.edits

    def tables(self) -> Sequence[Table]:
        return [table for found in self.found.values() for table in found.tables()]

    def held(self) -> dict[str, Any]:
        return {"models": {label: found.as_dict() for label, found in self.found.items()}}


def read(path: Path, content: Mapping[str, Any], shared: Mapping[str, Any]) -> MethodsRecipe:
    places = content["places"]
    rows = content.get("rows") or [{"label": name, "method": name} for name in METHODS]
    batches, steps = (_sizes(path, places, name) for name in ("batches", "steps"))
    single, step, fluency = (
        whole(path, f"[places] {name}", places.get(name, usual), least)
        for name, usual, least in (("singles", 0, 0), ("step", 10, 1), ("fluency", 10, 0))
    )
    lines = read_rows(path, {**content, "rows": rows}, 1, text)
    if wrong := [line.label for line in lines if line.method is None]:
        raise BadFile(f"{path}: row {wrong[0]!r} has no method; give it one")
    if len({slug(line.label) for line in lines}) < len(lines):
        raise BadFile(f"{path}: two rows have the same label, or labels that differ in signs alone; give each its own")
    against = texts(path, "against", content.get("against", []), least=0)
    if wrong := sorted(set(against) - {line.label for line in lines}):
        raise BadFile(f"{path}: against names {wrong[0]!r}, which is no row; name one of the rows")
    edited = read_edited(path, content, one_seed="methods are compared with one seed")
    if not (batches or steps or single):
        raise BadFile(f"{path}: [places] names no number of edits; give singles, batches or steps")
    if any(n > edited["n_facts"] for n in (*batches, *steps, single)):
        raise BadFile(f"{path}: [places] edits between 1 and data.edits = {edited['n_facts']} facts; correct them")
    return MethodsRecipe(
        **shared,
        **edited,
        batches=batches,
        steps=steps,
        rows=lines,
        step=step,
        singles=single,
        fluency=fluency,
        against=against,
        tokens=edited["max_tokens"] if "max_tokens" in content.get("statistics", {}) else None,
    )


def _sizes(path: Path, places: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """The numbers of edits of `batches` or `steps`, each once."""
    given, key = places.get(name, []), f"[places] {name}"
    if not isinstance(given, list):
        refuse(path, key, given, "a list of whole numbers, as [1, 10]")
    return once(path, key, tuple(whole(path, key, n, 1) for n in given))


def run(recipe: MethodsRecipe, how: How) -> MethodsRun:
    """One table a model; finished rows are kept in `how.folder`, in a folder a method.

    Raises:
        KtError: a row's own settings do not fit a model.
        WorkFailed: no row of any model could be measured.
    """
    from ..experiments.methods_table import Place, methods_table

    only = None if how.only is None else recipe.named(how.only)
    if how.smoke and only is None:  # that it runs, not what all methods do
        only = list(recipe.against) or [recipe.rows[0].label]
    used = recipe.smoked() if how.smoke else recipe
    facts = edited_facts(used, how)
    places = [Place("single", 1)] * (used.singles > 0)
    places += [Place("batch", n) for n in used.batches] + [Place("steps", n) for n in used.steps]
    found = {}
    for label, name in how.models.items():
        model = how.load(name)
        found[label] = methods_table(
            model,
            facts,
            {line.label: used.options_of(line, how.smoke) for line in used.rows},
            places,
            against=used.against,
            singles=used.singles,
            step=used.step,
            fluency=used.fluency,
            only=only,
            folder=how.place(label),
            resume=how.resume,
            seed=used.seeds[0],
            statistics=how.statistics,
            corpus=how.corpus or used.corpus,
            max_tokens=used.tokens,
            batch_size=how.batch_size,
            stage=how.stage,
        )
        del model
    failed = {label: table.failed for label, table in found.items()}
    if failed and all(len(failed[label]) == len(table.rows) > 0 for label, table in found.items()):
        label, (row, *_) = next(iter(failed.items()))
        raise WorkFailed(f"nothing was measured on {label}: {row.series} at {row.label}: {row.settings['failed']}")
    return MethodsRun(used, how.smoke, found)


METHODS_KIND = Kind(
    {
        "": Keys(("places", "statistics", "rows", "against"), ("places",)),
        "places": Keys(("batches", "steps", "step", "singles", "fluency")),
        **TABLES,
    },
    read,
    run,
)
