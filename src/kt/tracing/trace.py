"""`Trace`: the measurements of causal tracing, by fact, kind, layer, token and noise draw.

A fact's two effects come from means over the draws (001, section 4.1):

prob        mean_S p_patched(r) - mean_S p_corrupted(r)
logit_diff  (mean_S d_patched - mean_S d_corrupted) / (d_clean - mean_S d_corrupted), d = logit(r) - logit(r'); eq. 8

That is denoising: a clean state in the corrupted run, and what it brings back (what suffices). In the noising direction
a corrupted state stands in the clean run, and the effect is what it takes away (what is needed): p_clean - mean_S
p_patched, and (d_clean - mean_S d_patched) over the same denominator. Both are 0 where the patch does nothing and 1
where the logit difference goes all the way (Zhang & Nanda 2023, arXiv 2309.16042; Heimersheim & Nanda 2024).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from ..errors import BadFact, WorkFailed
from ..prompts import Span
from .cases import LeftOut, why

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from .aggregate import Curve, RoleGrid

METRICS = ("prob", "logit_diff")
DIRECTIONS = ("denoise", "noise")


@dataclass(frozen=True, eq=False)
class TracedFact:
    """One fact's measurements. `index` is its place in the caller's list.

    `clean`, `corrupted` and `patched` are keyed by `prob`, p(r), and `logit_diff`, logit(r) - logit(r').
    """

    index: int
    id: str
    relation: str
    prompt: str
    subject: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    span: Span
    roles: tuple[str, ...]
    answer: str
    answer_id: int
    answer_source: str
    foil: str
    foil_id: int
    foil_source: str
    known: bool
    swapped_for: str | None
    clean: Mapping[str, float]
    corrupted: Mapping[str, Float[ndarray, " sample"]]
    patched: Mapping[str, Mapping[str, Float[ndarray, "layer token sample"]]]
    direction: str = "denoise"

    @property
    def p_clean(self) -> float:
        return self.clean["prob"]

    @property
    def p_corrupt(self) -> float:
        return _mean(self.corrupted["prob"])

    @property
    def ld_clean(self) -> float:
        return self.clean["logit_diff"]

    @property
    def ld_corrupt(self) -> float:
        return _mean(self.corrupted["logit_diff"])

    def effects(self, kind: str, metric: str) -> Float[ndarray, "layer token sample"]:
        """The effect draw by draw; eq. 8's denominator is the mean over draws for each of them."""
        patched = self.patched[str(kind)][metric].astype(np.float64)
        gained = patched - self.corrupted[metric].astype(np.float64)
        if self.direction == "noise":
            gained = self.clean[metric] - patched
        if metric == "prob":
            return gained
        gap = self.ld_clean - self.ld_corrupt
        if gap == 0:
            raise WorkFailed(
                f"{self.prompt!r}: clean and corrupted logit difference are equal, so eq. 8 has no value; "
                "use the prob metric or a stronger corruption"
            )
        return gained / gap

    def effect(self, kind: str, metric: str) -> Float[ndarray, "layer token"]:
        """P(r) or LD(r, r') of section 4.1."""
        return self.effects(kind, metric).mean(-1)


def _mean(values: Float[ndarray, " sample"]) -> float:
    return float(values.mean(dtype=np.float64))


@dataclass(frozen=True, eq=False)
class Trace:
    """What `causal_trace` returns: traced facts, the facts left out and why, and how it was done."""

    facts: tuple[TracedFact, ...]
    kinds: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    metadata: Mapping[str, Any]

    @property
    def n_facts(self) -> int:
        return len(self.facts)

    @property
    def n_layers(self) -> int:
        return int(self.metadata["n_layers"])

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(self.metadata["metrics"])

    def why_left_out(self) -> str:
        """Reasons with counts, for messages and manifests."""
        return why(self.left_out)

    def __repr__(self) -> str:
        kinds = ", ".join(self.kinds)
        return f"Trace({self.metadata['model']}: {kinds} of {self.n_facts} fact(s); {self.why_left_out()})"

    def _repr_html_(self) -> str:
        from .show import summary_html

        return summary_html(self)

    # Tables and means -------------------------------------------------------------------------------------------
    def to_dataframe(self) -> pd.DataFrame:
        """One row per fact, kind, layer, token and metric.

        `fact` is the fact's place in the caller's list; `clean` and `corrupted` are p(r) for the metric `prob` and
        the logit difference for `logit_diff`, the corrupted one averaged over the draws.
        """
        from .aggregate import to_dataframe

        return to_dataframe(self)

    def by_role(self, kind: str, metric: str = "logit_diff", n_boot: int = 2000, seed: int = 0) -> RoleGrid:
        """Means over facts of each fact's mean over the tokens of a role, with 95% bootstrap intervals over facts."""
        from .aggregate import by_role

        return by_role(self, self.checked(kind, metric), metric, n_boot, seed)

    def curve(
        self, kind: str, metric: str = "logit_diff", at: str = "subject_last", n_boot: int = 2000, seed: int = 0
    ) -> Curve:
        """The row of `by_role` at one role: effect by layer (Figure 2)."""
        from .aggregate import curve

        return curve(self, self.checked(kind, metric), metric, at, n_boot, seed)

    def checked(self, kind: str, metric: str) -> str:
        if str(kind) not in self.kinds:
            raise BadFact(f"this trace holds {', '.join(self.kinds)}, not {kind}; trace again with kinds=")
        if metric not in METRICS:
            raise BadFact(f"metric {metric!r} is unknown; choose among {', '.join(METRICS)}")
        return str(kind)

    # Figures ----------------------------------------------------------------------------------------------------
    def heatmap(self, kind: str = "mlp", metric: str = "logit_diff") -> go.Figure:
        """Layers across; down, the tokens of a single fact or the roles of several."""
        from .show import heatmap

        return heatmap(self, self.checked(kind, metric), metric)

    def heatmaps(self, metric: str = "logit_diff") -> go.Figure:
        """All kinds side by side, `mlp` and `attn` on one scale (Figure 1); single heads have `heads`."""
        from .show import heatmaps

        return heatmaps(self, metric)

    def heads(self, metric: str = "logit_diff", at: str = "subject_last") -> go.Figure:
        """Attention by head at one role: heads down, layers across; q is over all cells shown."""
        from .show import heads

        return heads(self, metric, at)

    def curves(self, at: str = "subject_last") -> go.Figure:
        """Both metrics by layer at one role, all kinds but single heads, with interval bands (Figure 2)."""
        from .show import curves

        return curves(self, at)

    def figure(self) -> go.Figure:
        """The heatmaps of all kinds, logit difference."""
        return self.heatmaps()

    # Files ------------------------------------------------------------------------------------------------------
    def save(self, path: str | os.PathLike[str]) -> Path:
        """One safetensors file: float32 arrays per fact, everything else as JSON in its header."""
        from .files import save

        return save(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Trace:
        """Read what `save` wrote."""
        from .files import load

        return load(path)

    def merge(self, others: Trace | Sequence[Trace]) -> Trace:
        """This trace's facts and the others', numbered on from this trace's list.

        Raises:
            BadFact: they differ in model, kinds, window or corruption, or hold the same fact twice.
        """
        from .files import merge

        return merge([self, *([others] if isinstance(others, Trace) else others)])
