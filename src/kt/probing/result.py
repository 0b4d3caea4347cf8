"""`Probe`: probability and rank of two answers, by fact, position, kind and layer (JEEP, Figure 2)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from .._util.data import complete_file, load_arrays, save_arrays
from .._util.kinds import takes
from .._util.text import count, without_folders
from ..errors import BadFact
from ..report import Column, Figure, Shown, Table
from ..report.table import layer_list
from ..stats import bootstrap_mean_grid, median_grid
from ..tracing.prompts import LeftOut, numbered_on, why
from .lens import KINDS, POSITIONS, LensReading
from .questions import ANSWERS, ProbedFact
from .stages import Stages, find_stages, no_stages

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


METRICS = ("rank", "prob")
STATISTICS = ("mean", "median")
NAMES = {"original": "original answer", "target": "target answer"}
KIND_TITLES = {"resid": "residual stream", "attn": "attention output", "mlp": "MLP output"}
POSITION_TITLES = {"subject_last": "last subject token", "prediction": "prediction position"}
_STAGES_AT = {"subject_last": ("enrichment",), "prediction": ("extraction", "promotion")}
_PROPOSED = {"enrichment": "layers_low", "promotion": "layers_high"}


class LensCurve(NamedTuple):
    """A mean (or median) over n facts by layer, with its 95% interval; NaN where n is too small to have one.

    `layers` may begin with -1: what enters block 0.
    """

    layers: tuple[int, ...]
    mean: Float[ndarray, " layer"]
    low: Float[ndarray, " layer"]
    high: Float[ndarray, " layer"]
    n: int


@dataclass(frozen=True, eq=False)
class Probe(Shown):
    """The result of `contrast_probe`: the facts, their reading, the facts left out and why, and how it was done.

    Attributes:
        facts: each with the two answers that were followed.
        layers: the blocks that were read, from 0.
        reading: probabilities and ranks (0 is the top) as [fact][position][kind][layer][answer (original, target)].
        set_names: the word sets that were followed too.
        left_out: the facts that were not probed, each with the reason.
        metadata: model, settings and versions of the run.
    """

    facts: tuple[ProbedFact, ...]
    layers: tuple[int, ...]
    reading: LensReading
    set_names: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    metadata: Mapping[str, Any]

    kind = "probe"
    heading = "Contrast probe"
    kinds = KINDS
    positions = POSITIONS
    answers = ANSWERS

    @property
    def n_facts(self) -> int:
        """Number of probed facts."""
        return len(self.facts)

    @property
    def n_layers(self) -> int:
        """Number of the model's blocks."""
        return int(self.metadata["n_layers"])

    @property
    def seed(self) -> int:
        """Of the bootstrap and of the stages' test; 0 in files of versions that took none."""
        return int(self.metadata.get("seed", 0))

    @property
    def same_first_token(self) -> tuple[ProbedFact, ...]:
        """The facts whose two answers no first token tells apart."""
        return tuple(fact for fact in self.facts if fact.same_first_token)

    def why_left_out(self) -> str:
        """Reasons with counts, for messages and manifests."""
        return why(self.left_out)

    def __repr__(self) -> str:
        same = len(self.same_first_token)
        told = f"; {same} with one first token for both answers" if same else ""
        size = f"{count(self.n_facts, 'fact')}, {count(len(self.layers), 'layer')}"
        return f"Probe({self.metadata['model']}: {size}{told}; {self.why_left_out()})"

    # Tables and means -------------------------------------------------------------------------------------------
    def to_dataframe(self) -> pd.DataFrame:
        """One row per fact, layer, position, kind and answer, with `prob` (eq. 5) and `rank` (eq. 6, 0 is the top).

        `fact` is the fact's place in the caller's list; `layer` the block whose output is read.
        """
        values = {"prob": self.reading.prob, "rank": self.reading.rank}
        return self._table("answer", ANSWERS, values)

    def sets_dataframe(self) -> pd.DataFrame:
        """One row per fact, layer, position, kind and word set, with the mean probability of a token of the set.

        Raises:
            BadFact: no word sets were given.
        """
        return self._table("set", self.set_names, {"prob": self._sets()})

    def _table(self, last: str, names: Sequence[str], values: Mapping[str, ndarray]) -> pd.DataFrame:
        import pandas as pd

        shape = (self.n_facts, len(POSITIONS), len(KINDS), len(self.layers), len(names))
        order = (0, 3, 1, 2, 4)
        axes = {
            "fact": np.array([fact.index for fact in self.facts], dtype=np.int64)[:, None, None, None, None],
            "layer": np.array(self.layers, dtype=np.int64)[None, None, None, :, None],
            "position": np.array(POSITIONS, dtype=object)[None, :, None, None, None],
            "kind": np.array(KINDS, dtype=object)[None, None, :, None, None],
            last: np.array(names, dtype=object),
        }
        columns = {name: np.broadcast_to(axis, shape) for name, axis in axes.items()} | dict(values)
        return pd.DataFrame({name: column.transpose(order).ravel() for name, column in columns.items()})

    @cached_property
    def counted(self) -> Bool[ndarray, " fact"]:
        """The facts that curves and stages are over: each once, without those whose answers cannot be told apart.

        Where no two answers can be told apart, all distinct facts.
        """
        first_index = {fact.identity: i for i, fact in reversed(list(enumerate(self.facts)))}
        first = np.array([first_index[fact.identity] == i for i, fact in enumerate(self.facts)])
        told_apart = np.array([not fact.same_first_token for fact in self.facts])
        return first & told_apart if (first & told_apart).any() else first

    @takes()
    def curve(
        self,
        kind: str = "resid",
        position: str = "prediction",
        answer: str = "original",
        metric: str = "rank",
        statistic: str = "mean",
        start: bool = False,
    ) -> LensCurve:
        """One answer by layer over distinct facts; with `start` also what enters block 0 (kind `resid` only).

        Means come with bootstrap intervals, medians with those of order statistics.

        Args:
            kind: `resid`, `attn` or `mlp`.
            position: `subject_last` or `prediction`.
            answer: `original` or `target`.
            metric: `rank` (0 is the top) or `prob`.
            statistic: `mean` or `median`.
            start: begin with what enters block 0.

        Returns:
            The statistic with its interval and n, by layer.
        """
        at = self._place(kind, position)
        a = chosen("answer", answer, ANSWERS)
        values = getattr(self.reading, chosen_name("metric", metric, METRICS))[self.counted][:, at[0], at[1], :, a]
        layers = self.layers
        if start and kind == "resid":
            entering = getattr(self.reading, f"start_{metric}")[self.counted][:, at[0], a]
            values, layers = np.concatenate([entering[:, None], values], 1), (-1, *layers)
        return _curve(layers, values, statistic, self.seed)

    def whole_curve(
        self, kind: str = "resid", answer: str = "original", metric: str = "rank", statistic: str = "mean"
    ) -> LensCurve:
        """All tokens of one answer by layer at the prediction position: `log_prob`, their sum, or the worst `rank`.

        Args:
            kind: "mlp", "attn" or "resid".
            answer: "original" or "target".
            metric: "rank" or "log_prob".
            statistic: "mean" or "median", over the facts.

        Returns:
            The curve, with the layers in their order.

        Raises:
            BadFact: whole answers were not read.
        """
        values = getattr(self.reading, f"whole_{chosen_name('metric', metric, ('rank', 'log_prob'))}")
        if values is None:
            raise BadFact("this probe read the answers' first tokens; probe again with whole=True")
        values = values[self.counted][:, chosen("kind", kind, KINDS), :, chosen("answer", answer, ANSWERS)]
        return _curve(self.layers, values, statistic, self.seed)

    def set_curve(
        self, name: str, kind: str = "resid", position: str = "prediction", statistic: str = "mean"
    ) -> LensCurve:
        """The mean probability of a word set's tokens by layer, over distinct facts that have such a set (Figure 5).

        Args:
            name: of the word set.
            kind: `resid`, `attn` or `mlp`.
            position: `subject_last` or `prediction`.
            statistic: `mean` or `median`.
        """
        p, k = self._place(kind, position)
        values = self._sets()[self.counted][:, p, k, :, chosen("set", name, self.set_names)]
        return _curve(self.layers, values, statistic, self.seed)

    def _sets(self) -> Float[ndarray, "fact position kind layer set"]:
        if self.reading.sets is None:
            raise BadFact("this probe has no word sets; probe again with sets='demo' or a JSON file of your own")
        return self.reading.sets

    def _place(self, kind: str, position: str) -> tuple[int, int]:
        return chosen("position", position, POSITIONS), chosen("kind", kind, KINDS)

    @cached_property
    def stages(self) -> Stages:
        """JEEP's stages by the rule of stages.py, and the layers that they propose to edit."""
        if self.layers != tuple(range(self.n_layers)):
            return no_stages(f"stages need all {self.n_layers} layers; probe without layers=")
        if len(self.same_first_token) == self.n_facts:
            return no_stages("the two answers of every fact begin with the same token")
        reading, keep = self.reading, self.counted
        resid = KINDS.index("resid")
        rank = np.concatenate([reading.start_rank[keep][:, :, None], reading.rank[keep][:, :, resid]], 2)
        prob = np.concatenate([reading.start_prob[keep][:, :, None], reading.prob[keep][:, :, resid]], 2)
        return find_stages(rank, prob, seed=self.seed)

    # Tables and figures -----------------------------------------------------------------------------------------
    def as_dict(self) -> dict[str, Any]:
        """For `--json`: `positions.<position>.<answer>.rank` and `.prob`, the residual stream's means by layer.

        `kinds.<kind>.<position>.<answer>.<metric>.<mean|median>` holds every kind with intervals, `sets` the word sets.
        """

        def curves(kind: str, position: str, answer: str) -> dict[str, Any]:
            return {m: {s: self.curve(kind, position, answer, m, s)._asdict() for s in STATISTICS} for m in METRICS}

        kinds = {k: {p: {a: curves(k, p, a) for a in ANSWERS} for p in POSITIONS} for k in KINDS}
        means = {
            position: {answer: {m: by[m]["mean"]["mean"] for m in METRICS} for answer, by in answers.items()}
            for position, answers in kinds["resid"].items()
        }
        values = {
            "model": self.metadata["model"],
            "final_norm": self.metadata["final_norm"],
            "n_facts": self.n_facts,
            "n_same_first_token": len(self.same_first_token),
            "left_out": [fact._asdict() for fact in self.left_out],
            "layers": self.layers,
            "positions": means,
            "kinds": kinds,
            "stages": self.stages.as_dict(),
        }
        if self.reading.whole_rank is not None:
            of = {a: {m: self.whole_curve("resid", a, m)._asdict() for m in ("rank", "log_prob")} for a in ANSWERS}
            values["whole"] = of
        if self.set_names:
            sets = {p: {n: self.set_curve(n, "resid", p)._asdict() for n in self.set_names} for p in POSITIONS}
            values["sets"] = sets
        return values

    def notes(self) -> Sequence[str]:
        """How many facts, and how they were read."""
        norm = "through the final norm" if self.metadata["final_norm"] else "without the final norm"
        facts = count(self.n_facts, "fact")
        return [f"{facts}, read {norm}; {self.why_left_out()}. Rank 0 is the top of the vocabulary."]

    def tables(self, statistic: str = "mean") -> Sequence[Table]:
        """The residual stream by layer (`statistic`: `mean` or `median`), then the stages of recall."""
        short = {"subject_last": "subject", "prediction": "prediction"}
        cells = [(position, answer) for position in POSITIONS for answer in ANSWERS]
        heads = [
            Column(f"{short[p]}: {answer} rank, prob", lambda pair: f"{pair[0]:.1f}  {pair[1]:.3f}")
            for p, answer in cells
        ]
        means = [[self.curve("resid", p, a, m, statistic).mean for m in METRICS] for p, a in cells]
        rows = [[str(layer), *((rank[i], prob[i]) for rank, prob in means)] for i, layer in enumerate(self.layers)]
        facts = count(int(self.counted.sum()), "fact")
        title = f"residual stream of {without_folders(self.metadata['model'])}, {statistic}s over {facts}"
        note = "rank 0 is the top" + ("" if self.metadata["final_norm"] else "; read without the final norm")
        by_layer = Table(["layer", *heads], rows, title, f"{note}; {self.why_left_out()}", only="command")
        whole = [self._whole_table(statistic)] if self.reading.whole_rank is not None else []
        return [by_layer, *whole, self.stages_table(), self._last_ranks()]

    def _whole_table(self, statistic: str) -> Table:
        heads = [
            Column(f"{NAMES[a]}: worst rank, log p", lambda pair: f"{pair[0]:.1f}  {pair[1]:.2f}") for a in ANSWERS
        ]
        both = [[self.whole_curve("resid", a, m, statistic).mean for m in ("rank", "log_prob")] for a in ANSWERS]
        rows = [[str(layer), *((r[i], p[i]) for r, p in both)] for i, layer in enumerate(self.layers)]
        return Table(["layer", *heads], rows, f"all tokens of the answers, residual stream, {statistic}s")

    def stages_table(self) -> Table:
        """Each stage with its layers and gain, or why there is none; then the layers that they propose to edit."""
        stages = (self.stages.enrichment, self.stages.extraction, self.stages.promotion)
        rows: list[list[Any]] = [[s.name, layer_list(s.layers), s.reason or s.gain] for s in stages]
        for name in ("layers_low", "layers_high"):
            rows.append([name, layer_list(getattr(self.stages, name)), "proposed for JEEP"])
        return Table(["stage", "layers", "gain [95%]"], rows, "stages of recall (JEEP, section 4.1)")

    def _last_ranks(self) -> Table:
        """Both answers' median rank at the prediction position after the last layer read."""
        curves = {NAMES[a].capitalize(): self.curve("resid", "prediction", a, "rank", "median") for a in ANSWERS}
        rows = [[name, f"{np.round(curve.mean[-1], 1):g}", curve.n] for name, curve in curves.items()]
        return Table(["", "median rank at the prediction position, last layer", "n"], rows, only="page")

    def figures(self, statistic: str = "mean") -> Sequence[Figure]:
        """Figure 2 of the residual stream, then of each module, then the word sets; `statistic`: `mean` or `median`."""
        says = f"The residual stream: {statistic}s over facts with 95% intervals; stages shaded."
        figures = [Figure(self.figure("resid", statistic), says, name="residual-stream")]
        for kind, name in (("attn", "attention"), ("mlp", "mlp")):
            says = f"The {KIND_TITLES[kind]}: {statistic}s over facts with 95% intervals."
            figures.append(Figure(self.figure(kind, statistic), says, name=name, only="command"))
        if self.set_names:
            says = "Mean probability of a token of each word set (JEEP, Figure 5)."
            figures.append(Figure(self.sets_figure(), says, name="word-sets"))
        return figures

    def figure(self, kind: str = "resid", statistic: str = "mean") -> go.Figure:
        """Rank and probability of both answers by layer at both positions, stages shaded (Figure 2).

        Args:
            kind: `resid`, `attn` or `mlp`.
            statistic: `mean` or `median`.
        """
        from ..figures.probe import probe_figure

        chosen("kind", kind, KINDS)
        panels = {
            position: {metric: _lines(self, kind, position, metric, statistic) for metric in METRICS}
            for position in POSITIONS
        }
        return probe_figure(
            panels,
            title=f"Contrast probe of {without_folders(self.metadata['model'])}, {KIND_TITLES[kind]}",
            subtitle=_subtitle(self),
            stages={position: _marks(self, position) for position in POSITIONS} if kind == "resid" else None,
            metric_titles={"rank": f"{statistic} rank (0 is the top)", "prob": f"{statistic} probability"},
        )

    def sets_figure(self, kind: str = "resid", position: str = "prediction") -> go.Figure:
        """The word sets' mean probabilities and the original answer's by layer, of one `kind` at one `position` (Figure
        5).
        """
        from ..figures.probe import sets_figure

        self._sets()
        self._place(kind, position)
        series = [_series(NAMES["original"], self.curve(kind, position, "original", "prob"), "original")]
        series += [_series(name, self.set_curve(name, kind, position), None) for name in self.set_names]
        title = (
            f"Word sets in {without_folders(self.metadata['model'])}, {KIND_TITLES[kind]}, {POSITION_TITLES[position]}"
        )
        return sets_figure(series, title=title, subtitle=_subtitle(self))

    # Files ------------------------------------------------------------------------------------------------------
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the probe to `path`, one safetensors file: arrays, and everything else as JSON in its header.

        The arrays are those of `LensReading` by name, with its axes.
        """
        arrays = {name: array for name, array in self.reading._asdict().items() if array is not None}
        header = {
            "kind": Probe.kind,
            "layers": list(self.layers),
            "set_names": list(self.set_names),
            "facts": [asdict(fact) for fact in self.facts],
            "left_out": [fact._asdict() for fact in self.left_out],
            "run": dict(self.metadata),
        }
        return save_arrays(path, arrays, header)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Probe:
        """Read the probe that `save` wrote to `path`.

        Raises:
            BadFile: the file is no probe, or not a whole one.
        """
        arrays, header = load_arrays(path, kind=Probe.kind)
        with complete_file(path, "probe", "probe again"):
            facts = tuple(ProbedFact(**fact) for fact in header["facts"])
            left_out = tuple(LeftOut(**fact) for fact in header["left_out"])
            layers, names, run = tuple(header["layers"]), tuple(header["set_names"]), dict(header["run"])
            reading = LensReading(**{"sets": None} | arrays)
            _check_shapes(reading, len(facts), len(layers), len(names))
            if missing := [name for name in (*_SAME, "dtype", "n_given", "warnings") if name not in run]:
                raise ValueError(f"the header lacks {', '.join(missing)}")
            return Probe(facts, layers, reading, names, left_out, run)

    @takes()
    def merge(self, others: Probe | Sequence[Probe]) -> Probe:
        """This probe's facts and the others', numbered on from this probe's list.

        Raises:
            BadFact: they differ in model, layers, norm or word sets, or hold the same fact twice.
        """
        probes = [self, *([others] if isinstance(others, Probe) else others)]
        for probe in probes[1:]:
            _must_match(self, probe)
        seen: set[tuple[Any, ...]] = set()
        for probe in probes:
            for fact in probe.facts:
                if fact.identity in seen:
                    raise BadFact(
                        f"{fact.prompt!r} is in two of the probes and would count twice; merge distinct facts"
                    )
            seen |= {fact.identity for fact in probe.facts}
        facts, left_out, n_given = numbered_on(probes)
        reading = LensReading.joined([probe.reading for probe in probes])
        metadata = _merged_metadata(probes, n_given)
        return Probe(tuple(facts), self.layers, reading, self.set_names, tuple(left_out), metadata)


def chosen_name(what: str, name: str, among: Sequence[str]) -> str:
    """The name, if it is a known one."""
    if name not in among:
        raise BadFact(f"{what} {name!r} is unknown; choose among {', '.join(among)}")
    return name


def chosen(what: str, name: str, among: Sequence[str]) -> int:
    return list(among).index(chosen_name(what, name, among))


def _curve(layers: tuple[int, ...], values: Float[ndarray, "fact layer"], statistic: str, seed: int) -> LensCurve:
    median = chosen_name("statistic", statistic, STATISTICS) == "median"
    grid = median_grid(values) if median else bootstrap_mean_grid(values, seed=seed)
    return LensCurve(layers, grid.mean, grid.low, grid.high, int(grid.n[0]))


# Probes as files, and several probes as one.

_SAME = ("model", "revision", "n_layers", "vocab", "final_norm")
"""Metadata that probes must share before their facts are averaged together."""


def _check_shapes(reading: LensReading, n_facts: int, n_layers: int, n_sets: int) -> None:
    sites, start = (n_facts, len(POSITIONS), len(KINDS), n_layers), (n_facts, len(POSITIONS))
    wanted: dict[str, tuple[tuple[int, ...], type]] = {
        "prob": ((*sites, len(ANSWERS)), np.float32),
        "rank": ((*sites, len(ANSWERS)), np.int32),
        "start_prob": ((*start, len(ANSWERS)), np.float32),
        "start_rank": ((*start, len(ANSWERS)), np.int32),
    }
    if n_sets or reading.sets is not None:
        wanted["sets"] = ((*sites, n_sets), np.float32)
    if reading.whole_rank is not None or reading.whole_log_prob is not None:
        along = (n_facts, len(KINDS), n_layers, len(ANSWERS))
        wanted |= {"whole_rank": (along, np.int32), "whole_log_prob": (along, np.float32)}
    if any(top is not None and top.shape[:-1] != sites for top in (reading.top, reading.top_prob)):
        raise ValueError(f"the most probable tokens are not of {sites} cells")  # an older kt's files have none
    for name, (shape, dtype) in wanted.items():
        array: ndarray | None = getattr(reading, name)
        if array is None or array.shape != shape or array.dtype != dtype:
            raise ValueError(f"{name} should be {np.dtype(dtype)} of shape {shape}")


def _must_match(first: Probe, other: Probe) -> None:
    pairs = [(name, first.metadata[name], other.metadata[name]) for name in _SAME]
    pairs.append(("whole answers", first.reading.whole_rank is not None, other.reading.whole_rank is not None))
    pairs += [("layers", first.layers, other.layers), ("word sets", first.set_names, other.set_names)]
    for name, value, other_value in pairs:
        if value != other_value:
            raise BadFact(f"probes of {name} {value!r} and {other_value!r} do not merge; probe both the same way")


def _merged_metadata(probes: Sequence[Probe], n_given: int) -> dict[str, Any]:
    """The first probe's, with a list of dtypes where they differ."""
    dtypes = [
        d
        for p in probes
        for d in ([p.metadata["dtype"]] if isinstance(p.metadata["dtype"], str) else p.metadata["dtype"])
    ]
    distinct = list(dict.fromkeys(dtypes))
    return dict(probes[0].metadata) | {
        "dtype": distinct[0] if len(distinct) == 1 else distinct,
        "warnings": [text for probe in probes for text in probe.metadata["warnings"]],
        "n_given": n_given,
        "tokens": {i: text for probe in probes for i, text in probe.metadata.get("tokens", {}).items()},
    }


# Data of the figures.


def _lines(probe: Probe, kind: str, position: str, metric: str, statistic: str) -> list[Any]:
    curves = {a: probe.curve(kind, position, a, metric, statistic, start=True) for a in ANSWERS}
    return [_series(NAMES[answer], curve, answer) for answer, curve in curves.items()]


def _series(name: str, curve: LensCurve, kind: str | None) -> Any:
    from ..figures import Series

    return Series(name, curve.layers, curve.mean, curve.low, curve.high, curve.n, kind)


def _marks(probe: Probe, position: str) -> list[Any]:
    from ..figures import Mark

    marks = []
    for name in _STAGES_AT[position]:
        stage = getattr(probe.stages, name)
        if stage.found:
            marks.append(Mark(name, stage.layers[0], stage.layers[-1], kind=name))
        proposed = getattr(probe.stages, _PROPOSED.get(name, ""), None)
        if proposed:
            marks.append(Mark(_PROPOSED[name], proposed[0], proposed[-1], kind=name, strip=True))
    return marks


def _subtitle(probe: Probe) -> str:
    n, same = int(probe.counted.sum()), len(probe.same_first_token)
    parts = [f"{count(n, 'distinct fact')}, 95% intervals over facts"]
    parts += ["raw: without the final norm"] * (not probe.metadata["final_norm"])
    parts += [f"{same} with one first token for both answers"] * bool(same)
    return " · ".join(parts)
