"""JEEP's stages of recall, found in the probe's curves by a written rule (JEEP, section 4.1).

The paper reads its stages off Figure 2 by eye. Here, with L_a(l) = log10(1 + rank of answer a) in the residual stream
after block l (l = -1: before block 0), P_a(l) its probability, o the original and t the target, means over facts:

enrichment  e(l) = [L_o(l-1) - L_o(l)] - [L_t(l-1) - L_t(l)] at the subject's last token: the original gains more rank
extraction  x(l) = min over a of L_a(l-1) - L_a(l) at the prediction position: both answers gain rank
promotion   p(l) = [P_o(l) - P_o(l-1)] - [P_t(l) - P_t(l-1)] at the prediction position: the original gains probability

A stage is the shortest run of consecutive layers whose summed gain reaches `SHARE` of the best run's, the lowest of
several; enrichment lies in the lower half of the layers, promotion begins not before extraction. It is reported where
the 95% bootstrap interval (over facts) of the gain over the run lies above 0; for enrichment also that of the
original's own rise, for extraction those of both answers (the smaller gain is reported).

The run is chosen on the same facts, so its gain is somewhat too high, and the best run of mere noise has an interval
above 0 often. So the choice is tested as well: with the sign of each fact's gains flipped at random, fewer than 5% of
draws may have a run, of any length, whose mean over its root mean square is as large as that of the run found.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from ..stats import Interval, bootstrap_mean, bootstrap_mean_grid, bootstrap_ratio
from .lens import POSITIONS
from .questions import ANSWERS

SHARE = 0.8
CHANCE = 0.05

_FLIPS = 2000
_MAX_NUMBERS = 2_000_000  # of the signs held at once

LOW_SHARE, HIGH_SHARE = 0.2, 0.1
"""Proposed shares of all layers. JEEP edits 6 low and 3 high of 32 layers (LLaMA-7B), 6 and 2 of 28 (GPT-J)."""

_NOTHING = Interval(float("nan"), float("nan"), float("nan"), 0)


class Stage(NamedTuple):
    """Layers [start, stop) with the gain summed over them (ranks in decades), or None twice and the reason."""

    name: str
    start: int | None
    stop: int | None
    gain: Interval
    reason: str = ""

    @property
    def found(self) -> bool:
        return self.start is not None

    @property
    def layers(self) -> tuple[int, ...]:
        return () if self.start is None or self.stop is None else tuple(range(self.start, self.stop))

    def __repr__(self) -> str:
        if self.start is None or self.stop is None:
            return f"none ({self.reason})" if self.reason else "none"
        return f"layers {self.start} to {self.stop - 1}, gain {self.gain.mean:.3g}"

    def as_dict(self) -> dict[str, Any]:
        return {"layers": list(self.layers) or None, "gain": self.gain.as_dict(), "reason": self.reason or None}


class Stages(NamedTuple):
    """The three stages and the layers that they propose to edit; None where there is no such stage."""

    enrichment: Stage
    extraction: Stage
    promotion: Stage
    layers_low: tuple[int, ...] | None
    layers_high: tuple[int, ...] | None

    def __repr__(self) -> str:
        found = (f"{stage.name} {stage!r}" for stage in (self.enrichment, self.extraction, self.promotion))
        return f"Stages({'; '.join(found)})"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>"

    def as_dict(self) -> dict[str, Any]:
        """For JSON, by name."""
        stages = {stage.name: stage.as_dict() for stage in (self.enrichment, self.extraction, self.promotion)}
        proposed = {"layers_low": self.layers_low, "layers_high": self.layers_high}
        return stages | {name: None if some is None else list(some) for name, some in proposed.items()}


def no_stages(reason: str) -> Stages:
    """None of the stages, for one reason."""
    names = ("enrichment", "extraction", "promotion")
    enrichment, extraction, promotion = (Stage(name, None, None, _NOTHING, reason) for name in names)
    return Stages(enrichment, extraction, promotion, None, None)


def find_stages(
    rank: Float[ndarray, "fact position step answer"],
    prob: Float[ndarray, "fact position step answer"],
    n_boot: int = 2000,
    seed: int = 0,
) -> Stages:
    """The stages of distinct facts. Step 0 is what enters block 0, step l + 1 the residual stream after block l."""
    subject, prediction = POSITIONS.index("subject_last"), POSITIONS.index("prediction")
    original, target = ANSWERS.index("original"), ANSWERS.index("target")
    risen = -np.diff(np.log10(1.0 + rank.astype(np.float64)), axis=2)
    promoted = np.diff(prob.astype(np.float64), axis=2)
    n_layers = risen.shape[2]

    rise = risen[:, subject, :, original]
    ahead = rise - risen[:, subject, :, target]
    both = [risen[:, prediction, :, a] for a in (original, target)]
    lead = promoted[:, prediction, :, original] - promoted[:, prediction, :, target]

    def stage(name: str, among: range, *gains: Float[ndarray, "fact layer"]) -> Stage:
        return _stage(name, gains, among, n_boot, seed)

    enrichment = stage("enrichment", range((n_layers + 1) // 2), ahead)
    if enrichment.found and not bootstrap_mean(rise[:, list(enrichment.layers)].sum(1), n_boot, seed).low > 0:
        reason = "the original's own rise is not told apart from zero"
        enrichment = enrichment._replace(start=None, stop=None, reason=reason)
    extraction = stage("extraction", range(n_layers), *both)
    promotion = stage("promotion", range(extraction.layers[0] if extraction.found else 0, n_layers), lead)

    low = _proposed(enrichment.layers, ahead.mean(0), LOW_SHARE)
    above = tuple(layer for layer in promotion.layers if low is None or layer > max(low))
    return Stages(enrichment, extraction, promotion, low, _proposed(above, lead.mean(0), HIGH_SHARE))


def _stage(name: str, gains: Sequence[Float[ndarray, "fact layer"]], among: range, n_boot: int, seed: int) -> Stage:
    """The run of the rule, if its gain lies above 0 and random signs seldom reach it."""
    of_the_lesser = np.min([gain.mean(0) for gain in gains], axis=0)  # the answer that gains less, layer by layer
    run = shortest_run(of_the_lesser, among)
    if run is None:
        return Stage(name, None, None, _NOTHING, "no layer gains")
    sums = [bootstrap_mean(gain[:, slice(*run)].sum(1), n_boot, seed) for gain in gains]
    total = min(sums, key=lambda interval: interval.low)
    what = f"the gain of layers {run[0]} to {run[1] - 1} is not told apart from"
    if not total.low > 0:
        return Stage(name, None, None, total, f"{what} zero")
    if not chance(gains, run, among, seed) < CHANCE:
        return Stage(name, None, None, total, f"{what} the best of chance")
    return Stage(name, *run, total)


def chance(gains: Sequence[Float[ndarray, "fact layer"]], run: tuple[int, int], among: range, seed: int = 0) -> float:
    """How often some run within `among` stands out as much as this one when the facts' signs are drawn at random.

    The statistic is mean / root mean square over facts; flips leave the denominator alone, so that layers where facts
    differ widely do not hide small gains elsewhere. Of several answers it is that of the one that gains less.
    """
    runs = [(a, b) for a in among for b in range(a + 1, among.stop + 1)]
    starts, stops = np.array(runs).T
    totals = [np.pad(np.cumsum(gain, 1), ((0, 0), (1, 0))) for gain in gains]
    scales = [np.array([np.sqrt(np.mean((total[:, b] - total[:, a]) ** 2)) for a, b in runs]) for total in totals]

    def standing(means: Sequence[Float[ndarray, "draw step"]]) -> Float[ndarray, "draw run"]:
        sums = [mean[:, stops] - mean[:, starts] for mean in means]
        parts = [
            np.divide(s, scale, out=np.zeros_like(s), where=scale > 0) for s, scale in zip(sums, scales, strict=True)
        ]
        least: Float[ndarray, "draw run"] = np.min(parts, axis=0)
        return least

    observed = standing([total.mean(0)[None] for total in totals])[0, runs.index(run)]
    n, rng, as_much = len(gains[0]), np.random.default_rng(seed), 0
    block = max(1, _MAX_NUMBERS // max(n, len(runs)))
    for start in range(0, _FLIPS, block):
        signs = rng.choice([-1.0, 1.0], (min(block, _FLIPS - start), n))
        best = standing([signs @ total / n for total in totals]).max(1)
        as_much += int((best >= observed - 1e-12).sum())
    return (1 + as_much) / (1 + _FLIPS)


def shortest_run(gain: Float[ndarray, " layer"], among: range) -> tuple[int, int] | None:
    """[start, stop) of the shortest run within `among` that has `SHARE` of the best run's gain; None without gain."""
    total = np.concatenate([[0.0], np.cumsum(gain)])
    runs = [(a, b, total[b] - total[a]) for a in among for b in range(a + 1, among.stop + 1)]
    best = max((sum_ for _, _, sum_ in runs), default=0.0)
    if not best > 0:
        return None
    # Rounding must not make one of two equal runs the longer one.
    enough = [(b - a, a, b) for a, b, sum_ in runs if sum_ >= SHARE * best * (1 - 1e-12)]
    _, start, stop = min(enough)
    return start, stop


def _proposed(layers: tuple[int, ...], gain: Float[ndarray, " layer"], share: float) -> tuple[int, ...] | None:
    """The consecutive layers, `share` of all layers in number, with the largest summed gain; the lowest of equals."""
    if not layers:
        return None
    width = min(len(layers), max(1, round(share * len(gain))))
    windows = [layers[i : i + width] for i in range(len(layers) - width + 1)]
    return max(windows, key=lambda some: (round(float(gain[list(some)].sum()), 12), -some[0]))


# The lead of an answer over other answers of its relation in the logit lens, and the part of it that an edit leaves.
#
# visibility   v = 1 - ln(1 + rank) / ln(V): 1 at the top of the vocabulary, 0 at its bottom
# advantage    a = v(old answer) - mean over controls v(control); controls are other answers of the same relation, so
#              an answer that is visible only because every answer of its relation is has none
# score        sum over cells of mean_facts a after the edit / the same sum before it, over the cells (position, layer)
#              where the unedited model gives the old answer an advantage
#
# The cells are chosen on the unedited model alone, so that they are the same for every edit: those whose mean has a 95%
# interval above 0, each tested by itself. A cell chosen by chance weighs little, because its advantage is small.

OLD, NEW, CONTROLS = 0, 1, slice(2, None)
"""The indices of the answers on the axis `token`."""

TOP = 10
"""Candidates that the head projection attack takes from each layer."""


class Remainder(NamedTuple):
    """The part of the old answer's advantage that an edit left, in some cells.

    `score` is after / before; `before` and `after` are the mean advantage over those cells (units of visibility), and
    `cells` are the (position, layer) that count. Without cells there is nothing to lose: all are NaN.
    """

    score: Interval
    before: Interval
    after: Interval
    cells: tuple[tuple[str, int], ...]

    def __repr__(self) -> str:
        said = f"{self.score}, {self.before} before" if self.cells else "no cell where the old answer led"
        return f"Remainder({said})"


def visibility(rank: Int[ndarray, "*cell"], vocab: int) -> Float[ndarray, "*cell"]:
    """1 - ln(1 + rank) / ln(V); NaN where the rank is -1 (no such token)."""
    seen = 1 - np.log1p(np.maximum(rank, 0, dtype=np.float64)) / math.log(vocab)
    return np.where(rank < 0, np.nan, seen)


def mean_visibility(rank: Int[ndarray, "*cell token"], vocab: int) -> Float[ndarray, "*cell"]:
    """The mean over the tokens that there are; NaN where there is none."""
    return mean_of_present(visibility(rank, vocab))


def mean_of_present(values: Float[ndarray, "*cell token"]) -> Float[ndarray, "*cell"]:
    """The mean over the tokens whose value is not NaN; NaN where there is none."""
    present = ~np.isnan(values)
    n = present.sum(-1)
    return np.divide(np.where(present, values, 0.0).sum(-1), n, out=np.full(n.shape, np.nan), where=n > 0)


def advantage(rank: Int[ndarray, "fact *cell token"], vocab: int) -> Float[ndarray, " fact *cell"]:
    """a for every fact and cell; NaN for a fact without controls."""
    return visibility(rank[..., OLD], vocab) - mean_visibility(rank[..., CONTROLS], vocab)


def in_top(rank: Int[ndarray, "fact position kind layer token"]) -> Float[ndarray, "fact position kind answer"]:
    """Whether the old and the new answer are among the best `TOP` tokens in any layer, and the share of controls."""
    present: ndarray = np.any(rank >= 0, axis=3)
    reached: ndarray = np.any((rank >= 0) & (rank < TOP), axis=3)
    n = present[..., CONTROLS].sum(-1)
    share = np.divide(reached[..., CONTROLS].sum(-1), n, out=np.full(n.shape, np.nan), where=n > 0)
    return np.stack([reached[..., OLD], reached[..., NEW], share], -1, dtype=np.float64)


def leading(before: Float[ndarray, " fact *cell"], n_boot: int = 2000, seed: int = 0) -> Bool[ndarray, "*cell"]:
    """The cells where the unedited model's mean advantage has a 95% interval above 0.

    A single fact has no interval: its cells are those with an advantage above 0, untested.
    """
    grid = bootstrap_mean_grid(before, n_boot, seed)
    bound = np.where(grid.n > 1, grid.low, grid.mean)
    return np.nan_to_num(bound, nan=0.0) > 0


def remainder(
    before: Float[ndarray, " fact *cell"],
    after: Float[ndarray, " fact *cell"],
    chosen: Bool[ndarray, "*cell"],
    names: tuple[tuple[str, int], ...],
    n_boot: int = 2000,
    seed: int = 0,
) -> Remainder:
    """Score and mean advantages over the chosen cells; `names` are the chosen cells' (position, layer)."""
    if not chosen.any():
        n = int((~np.isnan(before).any(tuple(range(1, before.ndim)))).sum())
        none = Interval(math.nan, math.nan, math.nan, n)
        return Remainder(none, none, none, ())
    was, now = before[:, chosen].mean(-1), after[:, chosen].mean(-1)
    return Remainder(
        bootstrap_ratio(now, was, n_boot, seed),
        bootstrap_mean(was, n_boot, seed),
        bootstrap_mean(now, n_boot, seed),
        names,
    )
