"""Screening: estimate every cell by attribution patching, then patch the cells with the largest estimates exactly.

An estimate costs about as much as three forwards (attribution.py). `exact` then holds the patched runs of each fact's
`top` cells, and with `check` those of all cells. The estimate is judged against these by the rank correlation over
cells and by its recall of the truly largest cells.

Correlations leave out cells that are zero in both maps. They are zero by construction (left of the corruption, or in
the last block away from the last token), so agreement on them is no evidence.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from .._util.kinds import NAMES, require_options, takes
from .._util.text import without_folders
from ..errors import BadFact
from ..facts.fact import Fact
from ..facts.load import FactsLike, distinct_facts, facts_from
from ..model.model import TracedModel
from ..model.tokens import token_ids
from ..report import Figure, Shown, Table
from ..report.table import pairs
from ..runs import parallel
from ..stats import Interval, bootstrap_mean
from .run import causal_trace
from .titles import METRIC_TITLES, NOISE_TITLES
from .trace import Trace
from .traced_fact import METRICS, TracedFact, metric_name

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class Screen(Shown):
    """The result of `screen`.

    Attributes:
        estimate: every cell, estimated from one gradient.
        exact: the patched cells; NaN where nothing was patched.
        metric: the effect by whose size cells were chosen.
        top: cells that were patched for each fact.
        complete: whether every cell was patched.
        seconds: CPU seconds, summed over processes, of the `estimate`, of patching the top cells (`exact_top`) and of
            the whole exact map (`exact`, or None). Each includes the preparation, which is repeated.
    """

    estimate: Trace
    exact: Trace
    metric: str
    top: int
    complete: bool
    seconds: Mapping[str, float | None]

    kind = "screen"

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Of the estimate."""
        return self.estimate.metadata

    @cached_property
    def pairs(self) -> tuple[tuple[TracedFact, TracedFact], ...]:
        """Each fact's estimate and exact map. A fact that only one of the traces holds (by rounding) has no pair."""
        exact = {fact.index: fact for fact in self.exact.facts}
        return tuple((fact, exact[fact.index]) for fact in self.estimate.facts if fact.index in exact)

    @cached_property
    def correlation(self) -> Interval | None:
        """Spearman's ρ over all cells of a fact, as a mean over facts; None unless the exact map is whole."""
        return self.correlation_of(None) if self.complete else None

    def correlation_of(self, kind: str | None) -> Interval:
        """Spearman's ρ over the patched cells of one kind (None: of all kinds), as a mean over facts."""
        kinds = self.estimate.kinds if kind is None else (self.estimate.checked(kind, self.metric),)
        return bootstrap_mean([spearman(*(_flat(fact, kinds, self.metric) for fact in pair)) for pair in self.pairs])

    @cached_property
    def correlation_checked(self) -> Interval:
        """Spearman's ρ over the screened cells alone. The estimate chose them, so this ρ is biased: a narrow range
        lowers it, and cells that the estimate missed cannot count against it.
        """
        correlations = []
        for pair in self.pairs:
            estimate, exact = (_flat(fact, self.estimate.kinds, self.metric) for fact in pair)
            chosen = ranks_from_largest(estimate) <= self.top
            correlations.append(spearman(estimate[chosen], exact[chosen]))
        return bootstrap_mean(correlations)

    @cached_property
    def recall(self) -> Interval | None:
        """The share of a fact's `top` largest exact effects that the screen chose; None unless the map is whole."""
        if not self.complete:
            return None
        recalls = []
        for pair in self.pairs:
            chosen, largest = (
                ranks_from_largest(_flat(fact, self.estimate.kinds, self.metric)) <= self.top for fact in pair
            )
            recalls.append(float((chosen & largest).sum() / largest.sum()))
        return bootstrap_mean(recalls)

    @property
    def checked(self) -> pd.DataFrame:
        """The rows of `to_dataframe` that the screen chose, each fact's largest estimates first."""
        table = self.to_dataframe()
        return table[table["rank"] <= self.top].sort_values(["fact", "rank"], ignore_index=True)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per fact, kind, layer and token: role, both effects, and the rank of |estimate|, 1 at the top."""
        import pandas as pd

        parts = []
        for estimated, exact in self.pairs:
            kinds = self.estimate.kinds
            shape = (len(kinds), self.estimate.n_layers, len(estimated.tokens))
            kind, layer, token = (axis.ravel() for axis in np.indices(shape))
            estimate = _flat(estimated, kinds, self.metric)
            parts.append(
                pd.DataFrame(
                    {
                        "fact": estimated.index,
                        "kind": np.array(kinds, dtype=object)[kind],
                        "layer": layer,
                        "token": token,
                        "role": np.array(estimated.roles, dtype=object)[token],
                        "metric": self.metric,
                        "estimate": estimate,
                        "exact": _flat(exact, kinds, self.metric),
                        "rank": ranks_from_largest(estimate),
                    }
                )
            )
        return pd.concat(parts, ignore_index=True)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: the estimate's map; in `screen` how well it ranked the cells, and those that were patched."""
        found = {name: getattr(self, name) for name in ("correlation", "correlation_checked", "recall")}
        about = {"metric": self.metric, "top": self.top, "complete": self.complete, "seconds": dict(self.seconds)}
        means = {name: None if value is None else value.as_dict() for name, value in found.items()}
        return self.estimate.as_dict() | {"screen": about | means | {"cells": self.checked.to_dict("records")}}

    def tables(self, metric: str | None = None) -> Sequence[Table]:
        """The estimate's own tables (of `metric`; None: the first); then how far it can be trusted, what it saved."""
        rho = f"Spearman's ρ over the {self.top} patched cells of a fact (chosen by the estimate: biased)"
        rows = [[rho, str(self.correlation_checked)]]
        if self.correlation is not None:
            rows.append(["Spearman's ρ over all cells of a fact", str(self.correlation)])
            rows.append([f"share of the {self.top} largest effects that were patched", str(self.recall)])
        names = {"estimate": "estimating all cells", "exact_top": "patching the top", "exact": "patching all"}
        rows += [[f"CPU seconds, {names[n]}", f"{v:.2f}"] for n, v in self.seconds.items() if v is not None]
        if (whole := self.seconds["exact"]) and (estimate := self.seconds["estimate"]):
            rows.append(["the estimate is cheaper by a factor of", f"{whole / estimate:.1f}"])
        checked = self.checked.head(self.top)
        cells = Table(list(checked.columns), checked.to_numpy().tolist(), "the cells of largest estimate", only="page")
        return [*self.estimate.tables(metric), pairs(rows, "attribution patching against exact patching"), cells]

    @takes()
    def figures(self, metrics: Sequence[str] | None = None) -> Sequence[Figure]:
        """The estimate's figures (of `metrics`; None: all), then estimate against exact effect."""
        says = "Estimate against exact effect, cell by cell; on the diagonal the estimate is right."
        return [*self.estimate.figures(metrics), Figure(self.figure(), says, name="screen")]

    def figure(self) -> go.Figure:
        """Estimate against exact effect, cell by cell; on the diagonal the estimate is right."""
        from ..figures.summary import screen_figure

        table = self.to_dataframe().dropna(subset=["exact"])
        table = table[(table["estimate"] != 0) | (table["exact"] != 0)]
        titles = NOISE_TITLES if self.estimate.metadata["direction"] == "noise" else METRIC_TITLES
        texts = {fact.index: fact.tokens for fact in self.estimate.facts}
        return screen_figure(
            table["estimate"].to_numpy(),
            table["exact"].to_numpy(),
            table["kind"].tolist(),
            [
                f"{kind}, layer {layer}, fact {fact}, token {texts[fact][token]!r}"
                for kind, layer, fact, token in table[["kind", "layer", "fact", "token"]].to_numpy().tolist()
            ],
            title=f"Attribution patching beside exact patching: {without_folders(self.estimate.metadata['model'])}",
            subtitle=self.summary(),
            axis=titles[self.metric],
        )

    def summary(self) -> str:
        """One line: how many cells were patched, how well the estimate ranked them, and the CPU seconds."""
        cells = sum(_flat(fact, self.estimate.kinds, self.metric).size for fact, _ in self.pairs)
        patched = min(self.top * len(self.pairs), cells)
        rho = f"Spearman over all cells {self.correlation}" if self.correlation else "exact map not asked for"
        recall = f", top {self.top} found {self.recall}" if self.recall else ""
        times = ", ".join(f"{name} {value:.2f} s" for name, value in self.seconds.items() if value is not None)
        return f"{patched} of {cells} cells screened; {rho}{recall}; {times}"

    def __repr__(self) -> str:
        return f"Screen({self.estimate.metadata['model']}, {self.metric}: {self.summary()})"


@takes(kinds=NAMES)
def screen(
    model: TracedModel,
    facts: FactsLike,
    kinds: Sequence[str] = ("mlp", "attn"),
    top: int = 20,
    metric: str = "logit_diff",
    check: bool = False,
    **options: Any,
) -> Screen:
    """Estimate all cells, then patch each fact's `top` cells of largest |estimate| exactly.

    Args:
        model: the loaded model, as `kt.load` returns it.
        facts: one or many, as in `causal_trace`.
        kinds: see `causal_trace`.
        top: cells for each fact, over all kinds together.
        metric: the effect whose size chooses: `prob` or `logit_diff`.
        check: also patch every other cell, for the correlation with the whole map and its time.
        options: further arguments of `causal_trace`.

    Returns:
        The estimated map, the exactly patched cells, and how well the estimate ranked them.

    Raises:
        BadFact: an argument that cannot be used.
        WorkFailed: no fact is left to trace, or a number is not finite.
    """
    if top < 1:
        raise BadFact(f"top is {top}; give at least 1")
    if (metric := metric_name(metric)) not in METRICS:
        raise BadFact(
            f"metric {metric}: a screen estimates {', '.join(METRICS)}; trace whole answers with causal_trace"
        )
    require_options(options, signature(causal_trace).parameters, "screen")
    if fixed := {"method", "only", "tokens"} & set(options):
        raise BadFact(f"screen sets {', '.join(sorted(fixed))} itself; leave it out")
    facts = distinct_facts(facts_from(facts), target=False)
    seconds: dict[str, float | None] = dict.fromkeys(("estimate", "exact_top", "exact"))
    estimate, seconds["estimate"] = _timed(model, facts, kinds=kinds, method="atp", **options)
    only = chosen_cells(model, facts, estimate, metric, top)
    exact, seconds["exact_top"] = _timed(model, facts, kinds=estimate.kinds, only=only, **options)
    if check:
        exact, seconds["exact"] = _timed(model, facts, kinds=estimate.kinds, **options)
    return Screen(estimate, exact, metric, top, check, seconds)


def chosen_cells(
    model: TracedModel, facts: Sequence[Fact], estimate: Trace, metric: str, top: int
) -> list[dict[str, Bool[ndarray, "layer token"]]]:
    """For each fact in the caller's list, its `top` cells of largest |estimate|; no cells where it was not traced."""
    chosen = []
    traced = {fact.index: fact for fact in estimate.facts}
    for i, fact in enumerate(facts):
        length = len(token_ids(model.reader, fact.prompt)) + estimate.metadata.get("at", 0)
        shape = (len(estimate.kinds), estimate.n_layers, length)
        cells = np.zeros(shape, dtype=bool)
        if i in traced:
            cells = (ranks_from_largest(_flat(traced[i], estimate.kinds, metric)) <= top).reshape(shape)
        chosen.append(dict(zip(estimate.kinds, cells, strict=True)))
    return chosen


def ranks_from_largest(values: Float[ndarray, " cell"]) -> Int[ndarray, " cell"]:
    """Ranks by |value|, 1 for the largest; ties keep their order."""
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[np.argsort(-np.abs(values), kind="stable")] = np.arange(1, len(values) + 1)
    return ranks


def spearman(first: Float[ndarray, " cell"], second: Float[ndarray, " cell"]) -> float:
    """Rank correlation with tied ranks averaged, over the cells that are finite in both and not zero in both.

    NaN with fewer than three such cells, or where one of the two is constant.
    """
    used = np.isfinite(first) & np.isfinite(second) & ((first != 0) | (second != 0))
    a, b = _ranked(first[used]), _ranked(second[used])
    if len(a) < 3 or a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def _ranked(values: Float[ndarray, " cell"]) -> Float[ndarray, " cell"]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _flat(fact: TracedFact, kinds: Sequence[str], metric: str) -> Float[ndarray, " cell"]:
    """The effects of all kinds as one axis: kind, layer, token."""
    return np.concatenate([fact.effect(kind, metric).ravel() for kind in kinds])


def _timed(model: TracedModel, facts: Sequence[Fact], **options: Any) -> tuple[Trace, float]:
    start = time.process_time()
    trace = causal_trace(model, facts, **options)
    return trace, sum(parallel.all_gather("CPU seconds", time.process_time() - start))
