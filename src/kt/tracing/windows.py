"""How much a window inflates a peak: the same facts traced with a window of layers and with single layers.

Restoring several layers together restores more than one of them does, so a peak grows and moves with the window
(Zhang & Nanda 2023, arXiv 2309.16042, section 5; ROME's figures have windows of 10). The inflation is the mean effect
at the window's peak over the mean effect at the peak of single layers. `sum_of_single` adds up the single layers'
effects inside the window. If the window's peak exceeds it, the layers act jointly; if not, they repeat each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from .._util.kinds import takes
from ..errors import BadFact
from ..report import Column, Table
from ..report.table import cell_text
from ..stats import Interval, bootstrap_mean, bootstrap_ratio
from .means import role_effects
from .patch import window_layers
from .prompts import ROLES
from .traced_fact import metric_name

if TYPE_CHECKING:
    from .trace import Trace


class Inflation(NamedTuple):
    """One kind at one role. `layer` and `single_layer` are the peaks; intervals are over facts at these layers."""

    kind: str
    metric: str
    role: str
    window: int
    layer: int
    peak: Interval
    single_layer: int
    single_peak: Interval
    sum_of_single: Interval
    inflation: Interval

    def as_dict(self) -> dict[str, object]:
        return {n: v.as_dict() if isinstance(v, Interval) else v for n, v in self._asdict().items()}


@takes()
def peak_inflation(
    wide: Trace, single: Trace, metric: str = "logit_diff", at: str = "subject_last", n_boot: int = 2000, seed: int = 0
) -> list[Inflation]:
    """Each kind's peak with a window beside its peak with single layers, over the facts that both traces hold.

    Args:
        wide: traced with a window of layers.
        single: traced with `window=1`, otherwise alike.
        metric: `prob` or `logit_diff`.
        at: the token role to compare at.
        n_boot: bootstrap samples of facts.
        seed: of the bootstrap.

    Returns:
        One row a kind, with both peaks, their layers and intervals, and their ratio.

    Raises:
        BadFact: `single` has a window, the two were not traced alike, or they share no fact.
    """
    _must_be_alike(wide, single)
    metric = metric_name(metric)
    inflations = []
    for kind in (k for k in wide.kinds if k in single.kinds):
        one, many = (_effects(t, single if t is wide else wide, kind, metric, at) for t in (single, wide))
        low, high = int(one.mean(0).argmax()), int(many.mean(0).argmax())
        inside = window_layers(high, int(wide.metadata["window"]), wide.n_layers)
        inflations.append(
            Inflation(
                kind,
                metric,
                at,
                int(wide.metadata["window"]),
                high,
                bootstrap_mean(many[:, high], n_boot, seed),
                low,
                bootstrap_mean(one[:, low], n_boot, seed),
                bootstrap_mean(one[:, inside.start : inside.stop].sum(1), n_boot, seed),
                bootstrap_ratio(many[:, high], one[:, low], n_boot, seed),
            )
        )
    return inflations


def inflation_table(found: Sequence[Inflation]) -> Table:
    """What a window adds to the peaks; single heads are left out."""

    def peak(cell: tuple[Interval, int]) -> str:
        return f"{cell[0].mean:.3f} ({cell[1]})"

    peaks = [Column("peak (layer)", peak), Column("single layers (layer)", peak)]
    rows = [
        [f.kind, (f.peak, f.layer), (f.single_peak, f.single_layer), cell_text(f.sum_of_single.mean), f.inflation]
        for f in found
        if ".h" not in f.kind
    ]
    title = f"window of {found[0].window} against single layers"
    note = "inflation: the window's peak over the peak of single layers, last subject token"
    return Table(["kind", *peaks, "their sum in the window", "inflation [95%]"], rows, title, note)


def _effects(trace: Trace, other: Trace, kind: str, metric: str, at: str) -> Float[ndarray, "fact layer"]:
    """Effects at a role of the facts that `other` holds too."""
    if at not in ROLES:
        raise BadFact(f"no role {at!r}; choose one of {', '.join(ROLES)}")
    shared = {fact.question for fact in other.facts}
    rows = [i for i, fact in enumerate(trace.facts) if fact.question in shared]
    effects = role_effects(trace, trace.checked(kind, metric), metric)[rows, ROLES.index(at)]
    effects = effects[np.isfinite(effects).all(1)]
    if not len(effects):
        raise BadFact(f"the two traces share no fact with a token of role {at!r}; trace the same facts twice")
    return effects


def _must_be_alike(wide: Trace, single: Trace) -> None:
    if single.metadata["window"] != 1:
        raise BadFact(f"the trace to compare with has a window of {single.metadata['window']}; trace it with window=1")
    for name in ("model", "corrupt", "direction", "method", "noise_scale", "seed", "samples"):
        ours, theirs = wide.metadata[name], single.metadata[name]
        if ours != theirs:
            raise BadFact(f"the two traces differ in {name}: {ours} and {theirs}; trace both alike")
