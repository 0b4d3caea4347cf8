"""Recipes of figures: a measurement of some facts a model, drawn, with what the paper's text says of it checked.

The kinds `trace` and `probe` differ in what they measure, draw and check; the rest is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from ..errors import KtError
from ..facts.fact import Fact
from ..report import Figure, Table
from .base import How, Keys, PaperRecipe, facts_of
from .claims import NOTHING, Claim, Finding, Verdict, beyond, note, tables
from .result import RecipeRun
from .values import whole

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from .._util.progress import Progress
    from ..model.model import TracedModel


DATA = Keys(("facts", "url", "format", "most"), ("facts",))


def most_of(path: Path, content: Mapping[str, Any]) -> int | None:
    """How many facts [data] says to take; None for all."""
    most = content["data"].get("most")
    return None if most is None else whole(path, "[data] most", most, 1)


class Measured(Protocol):
    """A `Trace` or a `Probe`."""

    @property
    def n_facts(self) -> int: ...
    @property
    def n_layers(self) -> int: ...
    def save(self, path: Any) -> Path: ...
    def why_left_out(self) -> str: ...


Found = TypeVar("Found", bound=Measured)
Drawn = TypeVar("Drawn", bound="FigureRecipe")


@dataclass(frozen=True, kw_only=True)
class FigureRecipe(PaperRecipe):
    """A figure of `n_facts` facts, and the claims that it is cited for."""

    claims: tuple[Claim, ...]

    def few(self: Drawn, n: int) -> Drawn:
        """The recipe on the demo model with few facts."""
        return replace(self.smoked(), n_facts=n)


@dataclass(frozen=True)
class FigureRun(RecipeRun, Generic[Found]):
    """A measurement for each model, and the verdicts on the claims."""

    found: Mapping[str, Found]
    verdicts: tuple[Verdict, ...]
    file: str
    drawn: Mapping[str, go.Figure]
    summaries: tuple[Table, ...]
    data: Mapping[str, Any]

    @property
    def n_facts(self) -> int:
        return max(each.n_facts for each in self.found.values())

    def tables(self) -> Sequence[Table]:
        """The claims where there are some; then what was measured."""
        return [*tables(self.verdicts, self.title, note(self.verdicts)), *self.summaries]

    def figures(self) -> Sequence[Figure]:
        """The figures of every model."""
        return [Figure(drawn, name=name) for name, drawn in self.drawn.items()]

    def save(self, folder: Path) -> None:
        """The raw measurements, under the names that `kt report` reads, one folder a model."""
        for label, each in self.found.items():
            (folder / label).mkdir(parents=True, exist_ok=True)
            each.save(folder / label / self.file)

    def held(self) -> dict[str, Any]:
        """`claims` with our figures, `models` with the curves."""
        return {"claims": [verdict.as_dict() for verdict in self.verdicts], "models": dict(self.data)}


def figure_facts(recipe: FigureRecipe, how: How, ask: str) -> list[Fact]:
    """The recipe's facts: of a file the first `n_facts`, of the demo's some that are spread over the relations.

    Raises:
        KtError: none has what is asked for, `answer` or two answers (`contrast`).
    """
    from ..demo.loop import spread

    spread_out = how.smoke and how.facts is None
    facts = facts_of(recipe, how, None if spread_out else recipe.n_facts)
    if ask == "contrast":
        facts = [fact for fact in facts if fact.target or fact.foil]
    if not facts:
        raise KtError(f"recipe {recipe.name}: no fact has a second answer; give facts with a target or a foil")
    return spread(facts, recipe.n_facts) if spread_out and recipe.n_facts else facts


@dataclass(frozen=True)
class View(Generic[Found]):
    """The views of one model's measurement in a kind of recipe: file name, checks of claims, figures, a table."""

    file: str
    check: Callable[[Found, str, Mapping[str, Any]], Any]
    figures: Callable[[Found], Mapping[str, go.Figure]]
    summary: Callable[[str, Found], Table]
    curves: Callable[[Found], Any]


def figure_run(
    recipe: FigureRecipe, how: How, doing: str, measure: Callable[[TracedModel, Progress], Found], view: View[Found]
) -> FigureRun[Found]:
    """Measure on each model in turn, one in memory at a time; draw, and check the claims."""
    measured: dict[str, Found] = {}
    for label, name in how.models.items():
        with how.stage(f"{doing} {label}") as tick:
            measured[label] = measure(how.load(name), tick)
    return FigureRun(
        recipe=recipe,
        smoke=how.smoke,
        found=measured,
        verdicts=tuple(
            Verdict(how.shown(label), claim, _finding(each, claim, view), how.smoke)
            for label, each in measured.items()
            for claim in recipe.claims
        ),
        file=view.file,
        drawn={
            f"{label}-{name}": drawn for label, each in measured.items() for name, drawn in view.figures(each).items()
        },
        summaries=tuple(view.summary(how.shown(label), each) for label, each in measured.items()),
        data={label: view.curves(each) for label, each in measured.items()},
    )


def _finding(found: Found, claim: Claim, view: View[Found]) -> Finding:
    """A claim's number and range; without a value where it is about layers that the model lacks."""
    if reason := beyond(claim.about, found.n_layers):
        return Finding("the model has these layers", NOTHING, reason=reason)
    finding: Finding = view.check(found, claim.check, claim.about)
    return finding
