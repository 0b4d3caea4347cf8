"""Checks of a contrast probe against what JEEP says of its Figures 2 and 5 (JEEP, section 4.1 and appendix A).

Ranks are compared as log10(1 + rank), as the stages are (probing/stages.py); everything is in the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from ..stats import Interval, bootstrap_mean, bootstrap_of_means, bootstrap_ratio
from .base import Keys
from .claims import NOTHING, Finding, layers_of, shown

if TYPE_CHECKING:
    from ..probing import Probe, Stage


STAGES = ("enrichment", "extraction", "promotion")
CHECKS = {
    "stage": Keys(("stage", "part", "layers", "either_count"), ("stage",)),
    "lags": Keys(("stage", "below"), ("stage",)),
    "worsens": Keys(("stage", "answer"), ("stage", "answer")),
    "declines": Keys(("answer",), ("answer",)),
    "steps-back": Keys(("answer", "layer"), ("answer", "layer")),
    "mirrors": Keys(("set", "above"), ("set",)),
    "rises": Keys(("set",), ("set",)),
    "dips": Keys(("set",), ("set",)),
    "rises-more": Keys(("set", "than"), ("set", "than")),
}
VALUES = {"stage": STAGES, "answer": ("original", "target")}
POSITION = {"enrichment": "subject_last", "extraction": "prediction", "promotion": "prediction"}
Curve = Float[ndarray, "fact layer"]


def check(probe: Probe, name: str, about: Mapping[str, Any]) -> Finding:
    """One claim's number and range; without a value where the probe lacks a word set."""
    for key in ("set", "than"):
        if key in about and about[key] not in probe.set_names:
            wanted = f"needs the word set {about[key]!r}; give a file of sets with --sets"
            return Finding("the set is probed", NOTHING, reason=wanted)
    return _CHECKS[name](probe, about)


def by_layer(probe: Probe, metric: str, answer: str, position: str = "prediction", start: bool = False) -> Curve:
    """Each counted fact's probability, or log10(1 + rank), by layer; with `start` first what enters block 0."""
    p, a = probe.positions.index(position), probe.answers.index(answer)
    reading, keep = probe.reading, probe.counted
    values = getattr(reading, metric)[keep][:, p, probe.kinds.index("resid"), :, a].astype(np.float64)
    if start:
        entering = getattr(reading, f"start_{metric}")[keep][:, p, a].astype(np.float64)
        values = np.concatenate([entering[:, None], values], 1)
    return np.log10(1.0 + values) if metric == "rank" else values


def of_set(probe: Probe, name: str) -> Curve:
    """Each counted fact's mean probability of a token of the set, by layer at the prediction position."""
    assert probe.reading.sets is not None, "check() saw that the set is there"
    p, k, s = probe.positions.index("prediction"), probe.kinds.index("resid"), probe.set_names.index(name)
    return probe.reading.sets[probe.counted][:, p, k, :, s].astype(np.float64)


def _run_of(probe: Probe, about: Mapping[str, Any]) -> Stage:
    stage: Stage = getattr(probe.stages, about["stage"])
    return stage


def _gains(probe: Probe, about: Mapping[str, Any], answer: str) -> Float[ndarray, " fact"]:
    """The rise of an answer's rank over a stage."""
    stage = _run_of(probe, about)
    rank = by_layer(probe, "rank", answer, POSITION[about["stage"]], start=True)
    return rank[:, stage.layers[0]] - rank[:, stage.layers[-1] + 1]


def _stage(probe: Probe, about: Mapping[str, Any]) -> Finding:
    """The stage is told apart from chance, and the middle of its layers lies where the paper has it."""
    where, stage = layers_of(about, probe.n_layers), _run_of(probe, about)
    rule = f"{stage.name} is found, and its centre lies in {where.words}"
    if not stage.found:
        return Finding(rule, stage.gain, reason=f"none: {stage.reason}", fails=True)
    centre = sum(stage.layers) / len(stage.layers)
    ours = f"layers {stage.layers[0]} to {stage.layers[-1]}, centre {centre:g}; gain {shown(stage.gain)}"
    value = Interval(centre, float("nan"), float("nan"), stage.gain.n)
    return Finding(rule, value, where.start - 0.5, where.stop - 0.5, ours)


def _needs_stage(check: Callable[[Probe, Mapping[str, Any]], Finding]) -> Callable[..., Finding]:
    def found(probe: Probe, about: Mapping[str, Any]) -> Finding:
        if not _run_of(probe, about).found:
            rule = f"over the layers of {about['stage']}"
            return Finding(rule, NOTHING, reason=f"there is no {about['stage']} to measure it over")
        return check(probe, about)

    return found


@_needs_stage
def _lags(probe: Probe, about: Mapping[str, Any]) -> Finding:
    """Over the stage the target answer gains less than a share of the rank that the original gains."""
    share = float(about.get("below", 0.5))
    rule = f"over {about['stage']} the target gains less than {share:g} of the original's gain in log rank"
    ratio = bootstrap_ratio(_gains(probe, about, "target"), _gains(probe, about, "original"))
    return Finding(rule, ratio, high=share)


@_needs_stage
def _worsens(probe: Probe, about: Mapping[str, Any]) -> Finding:
    """Over the stage the answer falls back in rank."""
    rule = f"over {about['stage']} the {about['answer']} answer loses log rank (above 0)"
    return Finding(rule, bootstrap_mean(-_gains(probe, about, about["answer"])), 0.0)


def _declines(probe: Probe, about: Mapping[str, Any]) -> Finding:
    """The probability peaks before the last layer."""
    rule = f"P({about['answer']}) after the last layer less its peak, below 0"
    change = bootstrap_of_means(by_layer(probe, "prob", about["answer"]), lambda means: means[:, -1] - means.max(1))
    return Finding(rule, change, high=0.0)


def _steps_back(probe: Probe, about: Mapping[str, Any]) -> Finding:
    """One layer, counted from the end (-2: the penultimate), worsens the answer's rank."""
    layer = int(about["layer"])
    rank = by_layer(probe, "rank", about["answer"], start=True)
    rule = f"log rank of the {about['answer']} answer after layer {probe.n_layers + layer} less before it, above 0"
    return Finding(rule, bootstrap_mean(rank[:, layer] - rank[:, layer - 1]), 0.0)


def _mirrors(probe: Probe, about: Mapping[str, Any]) -> Finding:
    """Over layers the set's mean probability goes with the original answer's."""
    values, other, n = of_set(probe, about["set"]), by_layer(probe, "prob", "original"), len(probe.layers)
    above = float(about.get("above", 0.5))
    correlation = bootstrap_of_means(
        np.concatenate([values, other], 1), lambda means: _correlation(means[:, :n], means[:, n:])
    )
    return Finding(
        f"correlation of {about['set']} with the original answer over layers above {above:g}", correlation, above
    )


def _correlation(a: Float[ndarray, "draw layer"], b: Float[ndarray, "draw layer"]) -> Float[ndarray, " draw"]:
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    scale = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.divide((a * b).sum(1), scale, out=np.full(len(a), np.nan), where=scale > 0)


def _rises(probe: Probe, about: Mapping[str, Any]) -> Finding:
    """From the layer where the original answer is most probable to the last, the set gains probability."""
    peak = int(by_layer(probe, "prob", "original").mean(0).argmax())
    values = of_set(probe, about["set"])
    rule = f"P({about['set']}) after the last layer less after layer {peak}, where the original peaks, above 0"
    return Finding(rule, bootstrap_mean(values[:, -1] - values[:, peak]), 0.0)


def _dips(probe: Probe, about: Mapping[str, Any]) -> Finding:
    """The set is lowest in between: it falls from the first layer, and comes back at the end."""
    depth = bootstrap_of_means(
        of_set(probe, about["set"]), lambda means: np.minimum(means[:, 0], means[:, -1]) - means.min(1)
    )
    return Finding(f"{about['set']}: the lower of the first and the last layer less the lowest, above 0", depth, 0.0)


def _rises_more(probe: Probe, about: Mapping[str, Any]) -> Finding:
    """From its own lowest layer to the last, one set rises more than the other."""
    n = len(probe.layers)
    both = np.concatenate([of_set(probe, about["set"]), of_set(probe, about["than"])], 1)
    lead = bootstrap_of_means(both, lambda means: _rise(means[:, :n]) - _rise(means[:, n:]))
    return Finding(f"{about['set']} rises from its lowest layer by more than {about['than']}", lead, 0.0)


def _rise(means: Float[ndarray, "draw layer"]) -> Float[ndarray, " draw"]:
    return means[:, -1] - means.min(1)


_CHECKS: dict[str, Callable[[Probe, Mapping[str, Any]], Finding]] = {
    "stage": _stage,
    "lags": _lags,
    "worsens": _worsens,
    "declines": _declines,
    "steps-back": _steps_back,
    "mirrors": _mirrors,
    "rises": _rises,
    "dips": _dips,
    "rises-more": _rises_more,
}
