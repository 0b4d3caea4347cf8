"""The balance factor α (IntAttn-Edit, eq. 12) and the critical layers of each module.

α = Σ_l LD_attn(l) / (Σ_l LD_mlp(l) + Σ_l LD_attn(l)): sums over all layers of eq. 8 at the last subject token, with
each layer's LD averaged over facts first (a ratio of sums of means, so no fact with a small sum can dominate).

Eq. 12 does not keep α within [0, 1], since restoring a layer can make the answer less likely. `alpha_raw` is eq. 12
unchanged, from signed sums. `alpha`, which edits use, counts a negative sum of a module as 0, so it lies in [0, 1].
`warnings` reports a negative sum or an `alpha_raw` outside [0, 1]. The interval is of `alpha`, over resampled facts.

`pooled` also sums over facts before eq. 8 divides by a fact's gap between clean and corrupted run: each fact counts by
its gap, so those that the corruption hardly moves, whose LD is noisy, hardly count. Eq. 12 is the papers' definition
and comes first: `setting` is α where it is determined (at least `FEW` facts, an interval at most `WIDEST` wide), else
`pooled` where that is, else nothing.

The critical layers R_attn and R_mlp follow one rule: of the contiguous runs of layers that contain the module's
strongest layer, take the shortest whose positive effects reach `SHARE` of the module's total positive effect, at most
a third of all layers wide; if none reaches it, the widest with the largest effect. Ties go to the lower layer. A
module without any positive effect gets no layers. `layer_shares` is the share of bootstrap draws of facts whose
proposal holds each layer; `stable_layers` are proposals of at least `FEW` facts whose every layer is in at least
`STABLE` of the draws.

At these layers restoring a state restores the answer. Hase et al. (2023), "Does Localization Inform Editing?", found
that tracing does not tell which layer is best to edit: treat the proposal as a start and compare layers by editing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from .._util.data import complete_file, read_json, write_json
from .._util.kinds import takes
from .._util.text import count, runs_of, without_folders
from ..errors import BadFile, WorkFailed
from ..report import Card, Figure, Shown, Table
from ..report.table import layer_list, pairs
from ..stats import Interval, bootstrap_mean_grid
from .means import role_effects
from .prompts import ROLES
from .titles import KIND_TITLES, METRIC_NAMES, METRIC_TITLES
from .traced_fact import metric_name

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from .trace import Trace


SHARE = 0.5
FEW = 10
"""Facts below which a percentile bootstrap covers too little, so that nothing is proposed as a setting."""
WIDEST = 0.5
"""Width of α's interval above which it does not tell MLP from attention."""
STABLE = 0.8
"""Share of draws below which a layer is not proposed as a setting."""
NEAR_ZERO = 0.05
"""Of the answer: where both of a fact's sums restore less, their ratio is noise."""
LAYER_DRAWS = 500
MODULES = ("attn", "mlp")


class FactBalance(NamedTuple):
    """Eq. 12 for one fact: its two sums over layers and α; None where eq. 12 has no value."""

    fact: int
    id: str
    prompt: str
    attn: float
    mlp: float
    alpha_raw: float | None
    alpha: float | None


class MixerShare(NamedTuple):
    """The part of eq. 12 that belongs to the layers of one mixer: Σ of LD over them, over the sum of both modules."""

    mixer: str
    layers: tuple[int, ...]
    share: float
    ci95: tuple[float, float] | None


class Setting(NamedTuple):
    """An α to edit with: its value, its 95% interval, and the estimate (`eq. 12` or `pooled`)."""

    alpha: float
    ci95: tuple[float, float]
    way: str


@dataclass(frozen=True)
class Balance(Shown):
    """The result of `balance_factor`. Intervals are None with a single fact.

    Attributes:
        alpha: attention's share of the effect (eq. 12), from 0 to 1; a negative sum counts as 0.
        alpha_raw: the signed ratio; None where the sums cancel.
        ci95: 95% bootstrap interval of `alpha` over facts.
        per_layer: by module (`attn`, `mlp`) the mean logit difference restored, one a layer.
        per_layer_ci95: their intervals.
        layers: by module the layers that the trace proposes to edit.
        per_fact: each fact's two sums and its own α.
        n_facts: number of facts.
        metric: `logit_diff` or `prob`.
        warnings: what makes α doubtful, in words.
        run: the trace's settings.
        pooled: α with the logit differences summed over facts before the division.
        pooled_ci95: its interval.
        layer_shares: by module, one a layer, the share of bootstrap draws that propose the layer; empty in old files.
        by_mixer: of a model with other mixers than attention, eq. 12 cut by what mixes tokens: the shares add up to
            `alpha_raw`.
    """

    kind = "balance"
    heading = "Balance factor"

    alpha: float
    alpha_raw: float | None
    ci95: tuple[float, float] | None
    per_layer: Mapping[str, tuple[float, ...]]
    per_layer_ci95: Mapping[str, tuple[tuple[float, float], ...] | None]
    layers: Mapping[str, tuple[int, ...]]
    per_fact: tuple[FactBalance, ...]
    n_facts: int
    metric: str
    warnings: tuple[str, ...]
    run: Mapping[str, Any]
    pooled: float | None = None
    pooled_ci95: tuple[float, float] | None = None
    layer_shares: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    by_mixer: tuple[MixerShare, ...] = ()

    def __repr__(self) -> str:
        interval = "no interval" if self.ci95 is None else f"95% interval {self.ci95[0]:.3f} to {self.ci95[1]:.3f}"
        sets = ", ".join(f"{name} {list(layers)}" for name, layers in self.layers.items())
        return f"Balance(alpha={self.alpha:.3f}, {interval}, n={self.n_facts}; {sets})"

    def to_dataframe(self) -> pd.DataFrame:
        """One row per fact: layer sums and eq. 12."""
        import pandas as pd

        return pd.DataFrame([fact._asdict() for fact in self.per_fact], columns=FactBalance._fields)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Of the trace that it rests on."""
        return self.run

    @property
    def interval(self) -> Interval:
        """α with its 95% interval and the number of facts; NaN ends where there is no interval."""
        return Interval(self.alpha, *(self.ci95 or (math.nan, math.nan)), self.n_facts)

    @property
    def setting(self) -> Setting | None:
        """α to edit with, and which estimate it is; None where neither is determined."""
        for value, ci95, way in ((self.alpha, self.ci95, "eq. 12"), (self.pooled, self.pooled_ci95, "pooled")):
            if value is not None and ci95 is not None and self.n_facts >= FEW and ci95[1] - ci95[0] <= WIDEST:
                return Setting(value, ci95, way)
        return None

    @property
    def stable_layers(self) -> dict[str, tuple[int, ...]]:
        """By module, the proposed layers; none for a module whose proposal other facts might well change."""
        shares = self.layer_shares
        return {
            kind: layers
            if kind in shares and self.n_facts >= FEW and min(shares[kind][i] for i in layers) >= STABLE
            else ()
            for kind, layers in self.layers.items()
            if layers
        }

    @property
    def unsteady(self) -> int:
        """Facts whose own α says nothing: sums of opposite signs, or both near zero."""
        return sum(f.attn * f.mlp < 0 or abs(f.attn) + abs(f.mlp) < NEAR_ZERO for f in self.per_fact)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: α (clamped, raw and pooled) with intervals, whether it is determined, and each layer's part."""
        names = ("alpha", "alpha_raw", "ci95", "pooled", "pooled_ci95", "n_facts", "per_layer", "layers")
        more = ("layer_shares", "stable_layers", "unsteady", "warnings", *(["by_mixer"] if self.by_mixer else []))
        setting = None if self.setting is None else self.setting._asdict()
        per_fact = self.to_dataframe().to_dict("records")
        return {name: getattr(self, name) for name in names + more} | {"setting": setting, "per_fact": per_fact}

    def notes(self) -> Sequence[str]:
        """The warnings, and what is not determined."""
        notes = list(self.warnings)
        if self.unsteady:
            notes.append(
                f"{self.unsteady} of {self.n_facts} facts have sums of opposite signs, or both below {NEAR_ZERO}: "
                "the α of one such fact says nothing"
            )
        if self.setting is None:
            notes.append(
                f"α is undetermined: it needs {FEW} facts or more and an interval at most {WIDEST} wide; trace more "
                "facts that the model knows, or give alpha as a number (0.3 is the papers')"
            )
        elif self.setting.way != "eq. 12":
            notes.append(f"α by eq. 12 is undetermined (interval wider than {WIDEST}); the pooled one is the setting")
        if unstable := [kind for kind, layers in self.layers.items() if layers and not self.stable_layers[kind]]:
            notes.append(
                f"the proposed layers of {', '.join(unstable)} are not stable: other facts might well give others; "
                "kt layers compares layers by editing"
            )
        return notes

    def headline(self) -> Sequence[Card]:
        """α with its interval."""
        return [Card("α, attention's share", self.interval)]

    def tables(self, per_fact: bool = False) -> Sequence[Table]:
        """α and the layers that it proposes; the sums of eq. 12 by module; with `per_fact`, eq. 12 of every fact."""
        rows: list[tuple[str, Any]] = [("alpha", self.interval), ("facts", str(self.n_facts))]
        if self.pooled is not None:
            pooled = Interval(self.pooled, *(self.pooled_ci95 or (math.nan, math.nan)), self.n_facts)
            setting = "undetermined" if self.setting is None else f"{self.setting.alpha:.3f} ({self.setting.way})"
            rows[1:1] = [("alpha, pooled", pooled), ("to edit with", setting)]
        for part in self.by_mixer:
            value = Interval(part.share, *(part.ci95 or (math.nan, math.nan)), self.n_facts)
            rows.append((f"of which {part.mixer} (layers {runs_of(part.layers)})", value))
        rows += [(f"{kind} layers", self._layers_text(kind)) for kind in self.layers]
        sums = [[name, sum(values), list(self.layers[name])] for name, values in self.per_layer.items()]
        columns = ["module", f"{METRIC_TITLES[self.metric]}, sum over layers", "proposed layers"]
        title = "balance factor (eq. 12)" + f", {self._of}" * bool(self._of)
        found = [pairs(rows, title, only="command"), Table(columns, sums, only="page")]
        facts = [list(fact) for fact in self.per_fact]
        return [*found, *([Table(FactBalance._fields, facts, "by fact")] if per_fact else [])]

    @property
    def _of(self) -> str:
        """Which metric, where it is not eq. 8's own."""
        return "" if self.metric == "logit_diff" else METRIC_NAMES[self.metric]

    def _layers_text(self, kind: str) -> str:
        """The proposed layers, and the least share of draws that propose one of them."""
        layers, shares = self.layers[kind], self.layer_shares.get(kind)
        least = f" (each in at least {min(shares[i] for i in layers):.0%} of draws)" if layers and shares else ""
        return layer_list(layers) + least

    def figures(self) -> Sequence[Figure]:
        """LD by layer."""
        says = "What each layer adds to the two sums of eq. 12, and the layers it proposes."
        return [Figure(self.figure(), says, name="balance")]

    def figure(self) -> go.Figure:
        """LD by layer for both modules, the proposed layers marked, and α."""
        from ..figures import Series, balance_figure

        series = {}
        for name, mean in self.per_layer.items():
            low, high = np.array(self.per_layer_ci95[name] or ((np.nan, np.nan),) * len(mean)).T
            title = KIND_TITLES[name]
            series[name] = Series(title, range(len(mean)), np.array(mean), low, high, self.n_facts, name)
        return balance_figure(
            series,
            self.interval,
            title=f"Balance factor of {without_folders(self.run['model'])}",
            subtitle=f"Last subject token, {count(self.n_facts, 'fact')}" + f", {self._of}" * bool(self._of),
            layers=self.layers,
            y_title=METRIC_TITLES[self.metric],
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the balance to `path` as JSON."""
        fields = asdict(self)
        older = [] if self.layer_shares or self.pooled is not None else ["pooled", "pooled_ci95", "layer_shares"]
        older += [] if self.by_mixer else ["by_mixer"]
        return write_json(path, {k: v for k, v in fields.items() if k not in older} | {"kind": self.kind})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Balance:
        """Read the balance that `save` wrote to `path`.

        Raises:
            BadFile: the file is not a balance, or an incomplete one.
        """
        fields = read_json(path)
        if fields.get("kind") != Balance.kind:
            raise BadFile(
                f"{path}: holds {fields.get('kind') or 'other JSON'}, expected a balance; kt alpha writes one"
            )
        with complete_file(path, "balance", "compute it again"):
            return Balance.of(fields)

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Balance:
        """From the fields that `save` wrote."""
        names = ("alpha", "alpha_raw", "n_facts", "metric", "run")
        found = {name: fields.get(name) for name in ("ci95", "pooled_ci95")}
        spans: dict[str, Any] = {name: None if span is None else tuple(span) for name, span in found.items()}
        return cls(
            **{name: fields[name] for name in names},
            **spans,
            per_layer={name: tuple(values) for name, values in fields["per_layer"].items()},
            per_layer_ci95={
                name: None if pairs is None else tuple((low, high) for low, high in pairs)
                for name, pairs in fields["per_layer_ci95"].items()
            },
            layers={name: tuple(values) for name, values in fields["layers"].items()},
            per_fact=tuple(FactBalance(**values) for values in fields["per_fact"]),
            warnings=tuple(fields["warnings"]),
            pooled=fields.get("pooled"),
            layer_shares={name: tuple(values) for name, values in fields.get("layer_shares", {}).items()},
            by_mixer=tuple(
                MixerShare(
                    part["mixer"],
                    tuple(part["layers"]),
                    part["share"],
                    part["ci95"] and (*part["ci95"],),  # type: ignore[arg-type]
                )
                for part in fields.get("by_mixer", ())
            ),
        )


@takes()
def balance_factor(trace: Trace, metric: str = "logit_diff", n_boot: int = 2000, seed: int = 0) -> Balance:
    """Eq. 12 from a trace of `attn` and `mlp`, with a percentile bootstrap interval over facts.

    Args:
        trace: of the kinds `mlp` and `attn`.
        metric: `logit_diff` (eq. 8) or `prob`; of a trace of whole answers also `log_prob_diff` or `log_prob`.
        n_boot: bootstrap samples of facts.
        seed: of the bootstrap.

    Returns:
        α with its interval, each layer's part, and the layers that it proposes.

    Raises:
        BadFact: the trace lacks a module or the metric.
        WorkFailed: neither module restores the answer, so α has no value.

    Examples:
        >>> trace = kt.causal_trace(model, facts[:3], samples=2, tokens="subject_last")
        >>> 0 <= kt.balance_factor(trace).alpha <= 1
        True
    """
    last, metric = ROLES.index("subject_last"), metric_name(metric)
    effects = {k: role_effects(trace, trace.checked(k, metric), metric)[:, last] for k in MODULES}
    grids = {k: bootstrap_mean_grid(effect, n_boot, seed) for k, effect in effects.items()}
    sums = np.stack([effects[k].sum(1) for k in MODULES], 1)  # (fact, module)
    attn, mlp = (float(v) for v in sums.mean(0))
    alpha, raw = clamped(attn, mlp), ratio(attn, mlp)
    if alpha is None:
        raise WorkFailed(
            f"neither attention ({attn:.3f}) nor MLP ({mlp:.3f}) restores the answer at the last subject token, so "
            "alpha has no value; trace facts that the model knows, or set alpha by hand"
        )
    ci95 = _interval(sums, n_boot, seed)
    gaps = np.array([abs(f.gap(metric)) if metric.endswith("diff") else 1.0 for f in trace.facts])
    weighted = sums * (gaps / gaps.mean())[:, None]
    return Balance(
        alpha=alpha,
        alpha_raw=raw,
        ci95=ci95,
        per_layer={str(k): tuple(grids[k].mean.tolist()) for k in MODULES},
        per_layer_ci95={
            str(k): tuple(zip(g.low.tolist(), g.high.tolist(), strict=True)) if trace.n_facts > 1 else None
            for k, g in grids.items()
        },
        layers={str(k): critical_layers(grids[k].mean) for k in MODULES},
        per_fact=tuple(
            FactBalance(f.index, f.id, f.prompt, float(a), float(m), ratio(a, m), clamped(a, m))
            for f, (a, m) in zip(trace.facts, sums, strict=True)
        ),
        n_facts=trace.n_facts,
        metric=metric,
        warnings=_warnings(attn, mlp, raw, ci95, trace),
        run={name: trace.metadata[name] for name in ("model", "window", "corrupt", "samples", "seed", "keep")},
        pooled=clamped(*(float(v) for v in weighted.mean(0))),
        pooled_ci95=_interval(weighted, n_boot, seed),
        layer_shares={str(k): _shares(effects[k], seed) for k in MODULES} if trace.n_facts > 1 else {},
        by_mixer=_by_mixer(trace, effects, n_boot, seed),
    )


def _by_mixer(
    trace: Trace, effects: Mapping[str, Float[ndarray, "fact layer"]], n_boot: int, seed: int
) -> tuple[MixerShare, ...]:
    """Eq. 12 cut by what mixes tokens, with a percentile bootstrap over facts; nothing where all of it is attention."""
    others = trace.other_mixers
    if not others:
        return ()
    mixers = list(trace.metadata["mixers"])
    cuts = {"attention": tuple(n for n, m in enumerate(mixers) if m == "attention"), **others}
    cuts = {mixer: layers for mixer, layers in cuts.items() if layers and mixer != "no mixer"}
    total = effects["attn"].sum(1) + effects["mlp"].sum(1)
    sums = np.stack([*(effects["attn"][:, list(layers)].sum(1) for layers in cuts.values()), total], 1)
    means = sums.mean(0)
    if not means[-1]:
        return ()
    n = len(sums)
    draws = np.stack([d.mean(0) for d in sums[np.random.default_rng(seed).integers(n, size=(n_boot, n))]])
    drawn = draws[draws[:, -1] > 0]
    spans: list[tuple[float, float] | None] = [None] * len(cuts)
    if n > 1 and len(drawn) >= n_boot / 2:
        low, high = np.quantile(drawn[:, :-1] / drawn[:, -1:], [0.025, 0.975], axis=0)
        spans = [(float(a), float(b)) for a, b in zip(low, high, strict=True)]
    shares = (float(value / means[-1]) for value in means[:-1])
    return tuple(MixerShare(*part, share, span) for part, share, span in zip(cuts.items(), shares, spans, strict=True))


def ratio(attn: float, mlp: float) -> float | None:
    """Eq. 12; None where the sums add up to 0."""
    return float(attn / (attn + mlp)) if attn + mlp != 0 else None


def clamped(attn: float, mlp: float) -> float | None:
    """Eq. 12 with negative sums counted as 0."""
    return ratio(max(attn, 0.0), max(mlp, 0.0))


def critical_layers(effects: Sequence[float] | Float[ndarray, " layer"], share: float = SHARE) -> tuple[int, ...]:
    """The shortest run of layers around the strongest with `share` of the positive effect; see the module."""
    positive = np.maximum(np.asarray(effects, dtype=np.float64), 0)
    total, n, peak = positive.sum(), len(positive), int(positive.argmax())
    if total == 0:
        return ()
    best = range(peak, peak + 1)
    for width in range(1, max(1, n // 3) + 1):
        starts = range(max(0, peak - width + 1), min(peak, n - width) + 1)
        start = max(starts, key=lambda s: (positive[s : s + width].sum(), -s))
        best = range(start, start + width)
        if positive[start : start + width].sum() >= share * total:
            break
    return tuple(best)


def _shares(effects: Float[ndarray, "fact layer"], seed: int) -> tuple[float, ...]:
    """The share of bootstrap draws of facts whose critical layers hold each layer."""
    n, layers = effects.shape
    draws = np.random.default_rng(seed).integers(n, size=(LAYER_DRAWS, n))
    counts = np.zeros(layers)
    for draw in draws:
        counts[list(critical_layers(effects[draw].mean(0)))] += 1
    return tuple((counts / LAYER_DRAWS).tolist())


def _interval(sums: Float[ndarray, "fact module"], n_boot: int, seed: int) -> tuple[float, float] | None:
    """Percentile bootstrap of `alpha` over facts, in blocks that bound memory."""
    n = len(sums)
    if n < 2:
        return None
    rng, block = np.random.default_rng(seed), max(1, 1_000_000 // n)
    means = [sums[rng.integers(n, size=(min(block, n_boot - i), n))].mean(1) for i in range(0, n_boot, block)]
    parts = np.maximum(np.concatenate(means), 0)
    parts = parts[parts.sum(1) > 0]  # alpha has no value if neither module restores anything
    if len(parts) < n_boot / 2:
        return None
    low, high = np.quantile(parts[:, 0] / parts.sum(1), [0.025, 0.975])
    return float(low), float(high)


def _warnings(
    attn: float, mlp: float, raw: float | None, ci95: tuple[float, float] | None, trace: Trace
) -> tuple[str, ...]:
    warnings = []
    for name, total in (("attention", attn), ("MLP", mlp)):
        if total < 0:
            warnings.append(f"the {name} layers sum to {total:.3f}; alpha takes a negative sum as none")
    if raw is None or not 0 <= raw <= 1:
        shown = "has no value" if raw is None or not math.isfinite(raw) else f"is {raw:.3f}, outside [0, 1]"
        warnings.append(f"alpha_raw (eq. 12 with its signs) {shown}")
    if ci95 is None:
        warnings.append("no interval: one fact, or resampled facts whose layers restore nothing")
    elif trace.n_facts < 10:
        warnings.append(f"the interval rests on {trace.n_facts} facts only")
    if trace.metadata["window"] > 1:
        warnings.append(
            f"traced with a window of {trace.metadata['window']} layers: neighbouring layers count together"
        )
    return tuple(warnings)
