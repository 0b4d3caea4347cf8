"""Recipes of the contrast probe: two answers through the layers, and word sets (JEEP, Figures 2 and 5).

One pass a model; it is not kept on the way: an interrupted run is begun again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadFile, KtError
from ..report import Table
from ..runs.folder import FILES
from ..stats import Interval
from . import probe_checks
from .base import How, Keys, Kind
from .claims import read_claims, shown
from .figure import DATA, FigureRecipe, FigureRun, View, figure_facts, figure_run, most_of
from .values import flag, text

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from .._util.progress import Progress
    from ..model.model import TracedModel
    from ..probing import Probe
    from ..probing.result import LensCurve
    from ..probing.word_sets import WordSets


SMOKE_FACTS = 24
SHIPPED = "stopwords"
"""In place of a file of word sets: the shipped stop words and what is left of the vocabulary without them."""
WHICH = ("answers", "sets")


@dataclass(frozen=True, kw_only=True)
class ProbeRecipe(FigureRecipe):
    """`draws`: `answers` (Figure 2) or `sets` (Figure 5); `sets`: `demo`, a file, `stopwords`, or None."""

    kind = "probe"
    takes = frozenset({"sets"})

    draws: str
    final_norm: bool
    sets: str | None


def read(path: Path, content: Mapping[str, Any], shared: Mapping[str, Any]) -> ProbeRecipe:
    settings, sets = content["probe"], None
    draws = text(path, "[probe] draws", settings["draws"], WHICH)
    if (draws == "sets") != ("sets" in settings):
        raise BadFile(f"{path}: [probe] draws = 'sets' and sets = ... belong together; give both or neither")
    if "sets" in settings:
        sets = text(path, "[probe] sets", settings["sets"])
    return ProbeRecipe(
        **shared,
        n_facts=most_of(path, content),
        claims=read_claims(path, content, probe_checks.CHECKS, probe_checks.VALUES),
        draws=draws,
        final_norm=flag(path, "[probe] final_norm", settings.get("final_norm", True)),
        sets=sets,
    )


def run(recipe: ProbeRecipe, how: How) -> FigureRun[Probe]:
    """One probe a model, the figure, and the claims."""
    from ..probing import contrast_probe

    if how.sets and recipe.sets is None:
        raise KtError(f"recipe {recipe.name} draws answers and no word sets; leave sets out")
    used = recipe.few(SMOKE_FACTS) if how.smoke else recipe
    named = how.sets or (None if used.sets is None else "demo" if how.smoke else used.sets)
    sets = None if named is None else _sets(named)
    facts = figure_facts(used, how, "contrast")
    rows: Any = how.batch_size

    def measure(model: TracedModel, tick: Progress) -> Probe:
        return contrast_probe(
            model, facts, used.final_norm, sets=sets, batch_size=rows, seed=used.seeds[0], progress=tick
        )

    view = View(FILES["probe"], probe_checks.check, lambda probe: _figures(probe, used), _summary, _curves)
    return figure_run(used, how, "probing", measure, view)


def _sets(named: str | Path) -> WordSets:
    from ..probing.word_sets import WordSets, open_sets

    return WordSets({}, "the shipped stop words") if named == SHIPPED else open_sets(named)


def _figures(probe: Probe, recipe: ProbeRecipe) -> dict[str, go.Figure]:
    if recipe.draws == "sets":
        return {"figure-5": probe.sets_figure()}
    return {"figure-2": probe.figure(), "figure-2-medians": probe.figure(statistic="median")}


def _summary(model: str, probe: Probe) -> Table:
    """The peak layer of each answer and set at the prediction position, and the probability there and at the end."""
    curves = {f"{answer} answer": probe.curve("resid", "prediction", answer, "prob") for answer in probe.answers}
    curves |= {f"set {name}": probe.set_curve(name) for name in probe.set_names}
    lines = []
    for name, curve in curves.items():
        top = int(curve.mean.argmax())
        ends = [shown(_at(curve, layer)) for layer in (top, -1)]
        lines.append([name, str(curve.layers[top]), *ends, str(curve.n)])
    columns = ["mean probability of", "peak layer", "there [95%]", "after the last layer [95%]", "n"]
    return Table(columns, lines, f"{model}: prediction position, residual stream", probe.why_left_out())


def _at(curve: LensCurve, layer: int) -> Interval:
    return Interval(float(curve.mean[layer]), float(curve.low[layer]), float(curve.high[layer]), curve.n)


def _curves(probe: Probe) -> dict[str, Any]:
    answers = {
        position: {
            a: {m: probe.curve("resid", position, a, m)._asdict() for m in ("rank", "prob")} for a in probe.answers
        }
        for position in probe.positions
    }
    return {
        "n_facts": probe.n_facts,
        "left_out": [fact._asdict() for fact in probe.left_out],
        "positions": answers,
        "stages": probe.stages.as_dict(),
        "sets": {name: probe.set_curve(name)._asdict() for name in probe.set_names},
    }


PROBE = Kind(
    {
        "": Keys(("probe", "claims"), ("probe",)),
        "data": DATA,
        "probe": Keys(("draws", "final_norm", "sets"), ("draws",)),
    },
    read,
    run,
)
