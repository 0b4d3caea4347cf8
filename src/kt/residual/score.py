"""`Residual`: the rest of the old fact after an edit, in the logit lens and in the edited model's answers.

IntAttn-Edit (section 1) says that edits of MLPs alone leave outdated knowledge in attention. `score` puts a number
to what is left in the residual stream, `by_kind` to attention and MLP outputs, `attacks` to what it takes to make the
model say it. advantage.py has the formulas, attacks.py the prompts.

`in_top` is the candidate set of the head projection attack of Patil, Hase and Bansal (arXiv:2309.17410): an attacker
who may read the best ten tokens of every layer finds the old answer in this share of the facts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from .._util.data import complete_file, load_arrays, plain, save_arrays
from .._util.kinds import takes
from .._util.text import count, without_folders
from ..errors import BadFact
from ..probing.controls import Control
from ..probing.lens import KINDS, POSITIONS, LensReading
from ..probing.questions import ProbedFact
from ..probing.result import Probe, chosen_name
from ..probing.stages import (
    CONTROLS,
    NEW,
    OLD,
    Remainder,
    advantage,
    in_top,
    leading,
    mean_of_present,
    mean_visibility,
    remainder,
    visibility,
)
from ..report import Card, Column, Figure, Shown, Table
from ..report.table import pairs
from ..stats import (
    Interval,
    bootstrap_mean,
    bootstrap_mean_grid,
    bootstrap_ratio,
    paired_bootstrap_difference,
)
from ..tracing.prompts import LeftOut, numbered_on, why
from .attacks import STATES, Attacks

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from ..figures import Mark, Series


BOTH = "both"
"""Both positions together."""
ANSWERS = ("original", "target", "control")
METRICS = ("rank", "prob")
_NAMES = {"original": "old answer", "target": "new answer", "control": "other answers of the relation"}


class Carrier(NamedTuple):
    """The module and position with most of the old answer's advantage after the edit, summed over its cells.

    `lead` is what it has over the next one, paired over facts; the largest of several is large partly by chance, so
    where this interval reaches 0 the carrier may as well be another.
    """

    kind: str
    position: str
    remaining: Interval
    lead: Interval | None


@dataclass(frozen=True, eq=False)
class Residual(Shown):
    """The result of `residual_fact`.

    Args:
        facts: the measured facts; `original` is the old answer, `target` the new one.
        controls: other answers of its relation, by fact.
        layers: the layers of the readings.
        readings: of the unedited (`before`) and the edited model (`after`); the axis `token` is the old answer, the new
            one, then the controls.
        elsewhere: the old answer's advantage on the unedited model where the prompt is about other subjects, NaN where
            there are none.
        attacks: shares of prompts on which the old answer wins.
        left_out: facts that the score leaves out, and why.
        metadata: model, edit and settings.
    """

    facts: tuple[ProbedFact, ...]
    controls: tuple[tuple[Control, ...], ...]
    layers: tuple[int, ...]
    readings: Mapping[str, LensReading]
    elsewhere: Float[ndarray, "fact position kind layer"]
    attacks: Attacks
    left_out: tuple[LeftOut, ...]
    metadata: Mapping[str, Any]

    kind = "residual"
    heading = "What is left of the old facts"

    # Advantages -------------------------------------------------------------------------------------------------
    @cached_property
    def scored(self) -> Bool[ndarray, " fact"]:
        """The facts that count, each once: with controls, and with answers that begin differently."""
        return self.told_apart & np.array([bool(some) for some in self.controls], dtype=bool)

    @cached_property
    def told_apart(self) -> Bool[ndarray, " fact"]:
        """The facts, each once, whose answers begin with different tokens."""
        first = {fact.identity: i for i, fact in reversed(list(enumerate(self.facts)))}
        return np.array(
            [not f.same_first_token and first[f.identity] == i for i, f in enumerate(self.facts)], dtype=bool
        )

    @cached_property
    def advantages(self) -> dict[str, Float[ndarray, "fact position kind layer"]]:
        """The old answer's advantage by state, of the facts that count."""
        return {s: advantage(self.readings[s].rank[self.scored], int(self.metadata["vocab"])) for s in STATES}

    @cached_property
    def chosen(self) -> Bool[ndarray, "position kind layer"]:
        """The cells where the unedited model's old answer leads; see advantage.leading."""
        return leading(self.advantages["before"], *self._draws)

    @property
    def _draws(self) -> tuple[int, int]:
        return int(self.metadata["n_boot"]), int(self.metadata["seed"])

    def _cells(self, kind: str, position: str) -> Bool[ndarray, "position kind layer"]:
        """The chosen cells of a kind at a position, or at both."""
        mask = np.zeros_like(self.chosen)
        at = slice(None) if position == BOTH else POSITIONS.index(position)
        mask[at, KINDS.index(kind)] = True
        return mask & self.chosen

    def _names(self, cells: Bool[ndarray, "position kind layer"]) -> tuple[tuple[str, int], ...]:
        return tuple((POSITIONS[p], self.layers[i]) for p, _, i in np.argwhere(cells))

    # Results ----------------------------------------------------------------------------------------------------
    @cached_property
    def by_kind(self) -> dict[str, dict[str, Remainder]]:
        """{kind: {position or "both": remainder}}."""
        before, after = self.advantages["before"], self.advantages["after"]
        return {kind: {at: self._remainder(before, after, kind, at) for at in (*POSITIONS, BOTH)} for kind in KINDS}

    def _remainder(self, before: ndarray, after: ndarray, kind: str, position: str) -> Remainder:
        cells = self._cells(kind, position)
        return remainder(before, after, cells, self._names(cells), *self._draws)

    @property
    def score(self) -> Interval:
        """The residual score: the residual stream, both positions.

        1: the edit took nothing of the old answer's lead; 0: it is no more visible than other answers of its relation;
        below 0: less visible than they are.
        """
        return self.by_kind["resid"][BOTH].score

    @cached_property
    def leads(self) -> dict[str, Float[ndarray, " fact"]]:
        """By state, the lead of each fact that counts, in the cells of the score, which is after over before."""
        cells = self._cells("resid", BOTH)
        return {state: self.advantages[state][:, cells].sum(-1) for state in STATES}

    @cached_property
    def floor(self) -> Interval:
        """The score without memory: the old answer's lead in prompts about other subjects, over its own lead.

        An answer that is common in its relation leads everywhere, and no edit has to undo that.
        """
        elsewhere = self.elsewhere[self.scored]
        return self._remainder(self.advantages["before"], elsewhere, "resid", BOTH).score

    @cached_property
    def above_floor(self) -> Interval:
        """score - floor over the facts that have both, resampled together: the part due to memory of the fact."""
        elsewhere = self.elsewhere[self.scored][:, self._cells("resid", BOTH)].sum(-1)
        return bootstrap_ratio(self.leads["after"] - elsewhere, self.leads["before"], *self._draws)

    @cached_property
    def carrier(self) -> Carrier | None:
        """None where neither module gives the old answer an advantage in the unedited model."""
        sums = {}
        for kind in ("attn", "mlp"):
            for position in POSITIONS:
                if (cells := self._cells(kind, position)).any():
                    sums[kind, position] = self.advantages["after"][:, cells].sum(-1)
        if not sums:
            return None
        first, *others = sorted(sums, key=lambda at: -float(np.mean(sums[at])))
        lead = paired_bootstrap_difference(sums[first], sums[others[0]], *self._draws) if others else None
        return Carrier(*first, bootstrap_mean(sums[first], *self._draws), lead)

    @cached_property
    def in_top(self) -> dict[str, dict[str, dict[str, dict[str, Interval]]]]:
        """{kind: {position: {state: {answer: share of facts}}}}: among the best ten tokens in any layer.

        Facts whose answers begin alike are left out; a fact's controls are averaged first.
        """
        ranks = {s: self.readings[s].rank[self.told_apart] for s in STATES}
        grids = {s: bootstrap_mean_grid(in_top(ranks[s]), *self._draws) for s in STATES}
        return {
            kind: {
                position: {s: {name: grids[s].cell(p, k, a) for a, name in enumerate(ANSWERS)} for s in STATES}
                for p, position in enumerate(POSITIONS)
            }
            for k, kind in enumerate(KINDS)
        }

    @takes()
    def difference(self, other: Residual, kind: str = "resid", position: str = BOTH) -> Interval:
        """This score minus the other's (or those of a kind), over the same facts, which are resampled together.

        Raises:
            BadFact: not the same facts and controls, or readings of another unedited model; no such kind or position.
        """
        same = (self.facts, self.controls, self.layers) == (other.facts, other.controls, other.layers)
        if not same or not np.array_equal(self.readings["before"].rank, other.readings["before"].rank):
            raise BadFact("the two residuals are not of the same facts on the same unedited model; measure both alike")
        cells = self._cells(chosen_name("kind", kind, KINDS), chosen_name("position", position, (*POSITIONS, BOTH)))
        now = [r.advantages["after"][:, cells].sum(-1) for r in (self, other)]
        return bootstrap_ratio(now[0] - now[1], self.advantages["before"][:, cells].sum(-1), *self._draws)

    # The probes behind it ---------------------------------------------------------------------------------------
    @cached_property
    def before(self) -> Probe:
        """The contrast probe of the unedited model."""
        return self._probe("before")

    @cached_property
    def after(self) -> Probe:
        """The contrast probe of the edited model."""
        return self._probe("after")

    def _probe(self, state: str) -> Probe:
        reading, both = self.readings[state], slice(OLD, NEW + 1)
        pairs = LensReading(
            reading.prob[..., both],
            reading.rank[..., both],
            reading.start_prob[..., both],
            reading.start_rank[..., both],
            None,
            reading.top,
            reading.top_prob,
        )
        return Probe(self.facts, self.layers, pairs, (), self.left_out, {**self.metadata, "state": state})

    # Tables and figures -----------------------------------------------------------------------------------------
    def to_dataframe(self) -> pd.DataFrame:
        """One row per fact, kind, position, layer, state (before, after) and answer (original, target, control).

        A control's row stands for all of the fact's controls: the mean probability, and the rank whose visibility is
        their mean, so that the advantage follows from the rows.
        """
        import pandas as pd

        prob, rank = (np.stack([answers(self, s, m) for s in STATES], 4) for m in ("prob", "rank"))
        facts = [f.index for f in self.facts]
        labels = (facts, POSITIONS, KINDS, self.layers, STATES, ANSWERS)
        index = pd.MultiIndex.from_product(labels, names=["fact", "position", "kind", "layer", "state", "answer"])
        frame = pd.DataFrame({"prob": prob.reshape(-1), "rank": rank.reshape(-1)}, index=index).reset_index()
        return frame[["fact", "kind", "position", "layer", "state", "answer", "prob", "rank"]].dropna(ignore_index=True)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: every number with its n and interval, without the arrays."""
        return {
            "residual_score": self.score.as_dict(),
            "floor": self.floor.as_dict(),
            "above_floor": self.above_floor.as_dict(),
            "n_facts": len(self.facts),
            "by_kind": {k: {p: _plain(cell) for p, cell in places.items()} for k, places in self.by_kind.items()},
            "carrier": None if self.carrier is None else _plain(self.carrier),
            "in_top": plain(self.in_top),
            "attacks": [_plain(row) for row in self.attacks.rows(self._draws[1], self._draws[0])],
            "left_out": [fact._asdict() for fact in self.left_out],
            **self.metadata,
        }

    def notes(self) -> Sequence[str]:
        """How many facts, and what the score is."""
        return [
            f"{_edit_words(self)}: {count(len(self.facts), 'fact')}; {self.why_left_out()}. The score is the share of "
            "the old answer's lead over other answers of its relation that the edit left: 1 is all of it, 0 none."
        ]

    def headline(self) -> Sequence[Card]:
        """The score."""
        return [Card("residual score", self.score)]

    def tables(self) -> Sequence[Table]:
        """The remainder by kind and position, the score beside its floor, and the attacks."""
        left = []
        for kind, places in self.by_kind.items():
            for at, r in places.items():
                seen = [None if at == BOTH else self.in_top[kind][at][s]["original"].mean for s in STATES]
                left.append([kind, at, r.score, r.before.mean, r.after.mean, *seen])
        share = lambda value: "" if value is None else f"{value:.2f}"  # noqa: E731
        columns = ["kind", "position", "residual [95%]", "advantage before", "after"]
        tops = [Column("in a top ten before", share), Column("after", share)]
        scores = [("residual score", self.score), ("floor, from prompts about other subjects", self.floor)]
        scores += [("difference", self.above_floor)]
        note = (
            f"n = {self.score.n}; {self.why_left_out()}; advantage: visibility of the old answer less that of others "
            "of its relation, a mean over facts; residual: after / before; in a top ten: share of facts"
        )
        return [
            Table([*columns, *tops], left, "what is left of the old answer", note),
            pairs(scores, "residual", "share of the lead [95%]"),
            self._attack_table(),
        ]

    def _attack_table(self) -> Table:
        """The share of facts on which an answer beats the new one, and the factor by which the old one leads."""
        n_boot, seed = self._draws
        rows = []
        for name in self.attacks.names:
            beats = self.attacks.row(name, "beats_new", "after", seed, n_boot)
            leads = [self.attacks.row(name, "log_ratio", state, seed, n_boot).excess for state in STATES]
            rows.append([name, beats.old.mean, beats.third.mean, beats.excess, leads[0].mean, leads[1]])
        columns = ["prompt", "old", "third, named alike", "old - third", "lead before", "lead after"]
        note = "old, third: share of facts on which it beats the new answer; lead: ln P(old)/P(third)"
        return Table(columns, rows, "is the old answer more probable than the new one?", note)

    def figures(self) -> Sequence[Figure]:
        """Before and after, at both positions."""
        says = "Rank at the {} position, before and after the edit."
        return [
            Figure(self.figure("prediction"), says.format("prediction"), name="before-after"),
            Figure(self.figure("subject_last"), says.format("subject's"), name="before-after-subject", only="command"),
        ]

    def figure(self, position: str = "prediction", metric: str = "rank") -> go.Figure:
        """Before and after side by side, one row per kind: old, new and other answers by layer.

        Args:
            position: `subject_last` or `prediction`.
            metric: `rank` or `prob`.
        """
        from ..figures.probe import before_after_probe

        for given, known in ((position, POSITIONS), (metric, METRICS)):
            if given not in known:
                raise BadFact(f"{given!r} is not drawn; choose among {', '.join(known)}")
        before, after = ({kind: _lines(self, s, kind, position, metric) for kind in KINDS} for s in STATES)
        where = {"subject_last": "at the subject's last token", "prediction": "at the prediction position"}[position]
        floor = "" if np.isnan(self.floor.mean) else f"floor {self.floor.mean:.3f}"
        y_title = "rank, geometric mean" if metric == "rank" else "mean probability"
        return before_after_probe(
            before,
            after,
            title=f"The old fact before and after the edit, {where}",
            subtitle=" · ".join(filter(None, (floor, _edit_words(self)))),
            score=self.score,
            metric=metric,
            y_title=y_title,
            marks=_edited(self),
        )

    # Files ------------------------------------------------------------------------------------------------------
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the residual to `path`, one safetensors file: the readings as arrays, everything else as JSON in its
        header.

        The arrays are `<state>.prob`, `<state>.rank`, ... and `<state>.attacks` for both states, and `elsewhere`.
        """
        arrays: dict[str, ndarray] = {"elsewhere": self.elsewhere}
        for state in STATES:
            kept = {name: getattr(self.readings[state], name) for name in (*_ARRAYS, *_TOPS)}
            arrays |= {f"{state}.{name}": array for name, array in kept.items() if array is not None}
            arrays[f"{state}.attacks"] = getattr(self.attacks, state)
        header = {
            "kind": Residual.kind,
            "facts": [asdict(fact) for fact in self.facts],
            "controls": [[control._asdict() for control in some] for some in self.controls],
            "layers": list(self.layers),
            "attacks": list(self.attacks.names),
            "left_out": [fact._asdict() for fact in self.left_out],
            "run": dict(self.metadata),
            "results": self.as_dict(),
        }
        return save_arrays(path, arrays, header)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Residual:
        """Read the residual that `save` wrote to `path`; the results are computed again from the arrays.

        Raises:
            BadFile: not there, not whole, or not a residual.
        """
        arrays, header = load_arrays(path, kind=Residual.kind)
        with complete_file(path, "residual", "measure it again"):
            facts = tuple(ProbedFact(**fact) for fact in header["facts"])
            controls = tuple(tuple(Control(**control) for control in some) for some in header["controls"])
            kept = {s: [arrays[f"{s}.{name}"] for name in _ARRAYS] for s in STATES}
            tops = {s: {"sets": None} | {name: arrays.get(f"{s}.{name}") for name in _TOPS} for s in STATES}
            readings = {s: LensReading(*kept[s], **tops[s]) for s in STATES}
            attacks = Attacks(tuple(header["attacks"]), *(arrays[f"{s}.attacks"] for s in STATES))
            left_out = tuple(LeftOut(**fact) for fact in header["left_out"])
            layers, elsewhere = tuple(header["layers"]), arrays["elsewhere"]
            residual = Residual(facts, controls, layers, readings, elsewhere, attacks, left_out, header["run"])
            _check_shapes(residual)
            return residual

    @staticmethod
    @takes()
    def joined(parts: Sequence[Residual]) -> Residual:
        """Residuals (`parts`) of different facts, each under its own edit, as one. Facts are numbered on from list to
        list.

        Raises:
            BadFact: they were measured differently, or share a fact.
        """
        _refuse_unequal(parts)
        facts, left_out, n_given = numbered_on(parts)
        readings = {state: LensReading.joined([part.readings[state] for part in parts]) for state in STATES}
        asked = [np.concatenate([getattr(part.attacks, state) for part in parts]) for state in STATES]
        attacks = Attacks(parts[0].attacks.names, *asked)
        elsewhere = np.concatenate([part.elsewhere for part in parts])
        about = dict(parts[0].metadata) | {"n_given": n_given, "parts": len(parts)}
        about["tokens"] = {i: text for part in parts for i, text in part.metadata.get("tokens", {}).items()}
        about["warnings"] = sorted({text for part in parts for text in part.metadata.get("warnings", ())})
        controls = tuple(some for part in parts for some in part.controls)
        return Residual(tuple(facts), controls, parts[0].layers, readings, elsewhere, attacks, tuple(left_out), about)

    # Looking ----------------------------------------------------------------------------------------------------
    def why_left_out(self) -> str:
        """Reasons with counts."""
        return why(self.left_out)

    def __repr__(self) -> str:
        what = f"{without_folders(self.metadata['model'])}, {self.metadata.get('method') or 'edit'}"
        facts = f"{count(len(self.facts), 'fact')}, {self.why_left_out()}"
        return f"Residual({what}: score {self.score}, floor {self.floor}; {facts})"


# Residuals as files, and several residuals as one.

_ARRAYS = ("prob", "rank", "start_prob", "start_rank")
_TOPS = ("top", "top_prob")
"""Also in files, but for those of an older kt."""
_SAME = ("model", "revision", "n_layers", "vocab", "final_norm", "seed", "n_boot", "prefixes")
"""Metadata that residuals must share before their facts are averaged together."""


def _check_shapes(residual: Residual) -> None:
    n, layers, names = len(residual.facts), len(residual.layers), len(residual.attacks.names)
    if len(residual.controls) != n:
        raise ValueError(f"{n} facts and {len(residual.controls)} rows of controls")
    for state in STATES:
        reading, attacks = residual.readings[state], getattr(residual.attacks, state)
        if reading.rank.shape[:4] != (n, 2, 3, layers) or reading.prob.shape != reading.rank.shape:
            raise ValueError(f"the {state} reading has the shape {reading.rank.shape}")
        if any(top is not None and top.shape[:4] != (n, 2, 3, layers) for top in (reading.top, reading.top_prob)):
            raise ValueError(f"the {state} reading has other tokens than cells")
        if attacks.shape[:2] != (n, names):
            raise ValueError(f"the {state} attacks have the shape {attacks.shape}")
    if residual.elsewhere.shape != (n, 2, 3, layers):
        raise ValueError(f"elsewhere has the shape {residual.elsewhere.shape}")


def _refuse_unequal(parts: Sequence[Residual]) -> None:
    if not parts:
        raise BadFact("there are no residuals to join; give at least one")
    first = parts[0]
    for part in parts[1:]:
        for name in _SAME:
            if part.metadata.get(name) != first.metadata.get(name):
                raise BadFact(
                    f"residuals of {name} {first.metadata.get(name)!r} and {part.metadata.get(name)!r} do not join; "
                    "measure both the same way"
                )
        if part.layers != first.layers or part.attacks.names != first.attacks.names:
            raise BadFact("residuals of other layers or attacks do not join; measure both the same way")
    seen: set[tuple[str, str, int, int]] = set()
    for fact in (fact for part in parts for fact in part.facts):
        if fact.identity in seen:
            raise BadFact(f"{fact.prompt!r} is in two of the residuals and would count twice; join distinct facts")
        seen.add(fact.identity)


# Data of the tables and figures.


def answers(residual: Residual, state: str, metric: str) -> Float[ndarray, "fact position kind layer answer"]:
    """Old, new and mean control by cell: the probability, or the rank (see `Residual.to_dataframe`)."""
    reading = residual.readings[state]
    if metric == "prob":
        prob = reading.prob.astype(np.float64)
        return np.stack([prob[..., OLD], prob[..., NEW], mean_of_present(prob[..., CONTROLS])], -1)
    return _ranks(np.stack(_visibilities(residual, state), -1), int(residual.metadata["vocab"]))


def _visibilities(residual: Residual, state: str) -> list[Float[ndarray, "fact position kind layer"]]:
    rank, vocab = residual.readings[state].rank, int(residual.metadata["vocab"])
    return [
        visibility(rank[..., OLD], vocab),
        visibility(rank[..., NEW], vocab),
        mean_visibility(rank[..., CONTROLS], vocab),
    ]


def _ranks(seen: Float[ndarray, "*cell"], vocab: int) -> Float[ndarray, "*cell"]:
    """The rank of a visibility: from a mean of visibilities, the geometric mean of 1 + rank, minus 1."""
    return np.expm1((1 - seen) * np.log(vocab))


def _plain(row: NamedTuple) -> dict[str, Any]:
    return {name: plain(value) for name, value in row._asdict().items()}


def _lines(residual: Residual, state: str, kind: str, position: str, metric: str) -> list[Series]:
    from ..figures import Series

    p, k = POSITIONS.index(position), KINDS.index(kind)
    vocab = int(residual.metadata["vocab"])
    if metric == "prob":
        values = answers(residual, state, "prob")[residual.scored, p, k]
    else:
        values = np.stack(_visibilities(residual, state), -1)[residual.scored, p, k]
    grid = bootstrap_mean_grid(values, int(residual.metadata["n_boot"]), int(residual.metadata["seed"]))
    mean, low, high = grid[:3]
    if metric == "rank":  # more visible is a lower rank, so the interval's ends change places
        mean, low, high = (_ranks(part, vocab) for part in (mean, high, low))
    columns = [(name, mean[:, a], low[:, a], high[:, a], grid.n[:, a]) for a, name in enumerate(ANSWERS)]
    return [Series(_NAMES[name], residual.layers, m, lo, hi, n, kind=name) for name, m, lo, hi, n in columns]


def _edit_words(residual: Residual) -> str:
    about = residual.metadata
    alpha = about.get("alpha")
    share = f", α {alpha:.3g}" if isinstance(alpha, int | float) else ""
    return f"{without_folders(about['model'])}, {about.get('method') or 'edit'}{share}"


def _edited(residual: Residual) -> dict[str, list[Mark]]:
    """Runs of layers whose weights the edit changed, by kind."""
    from ..figures import Mark

    marks = {}
    for kind, layers in residual.metadata.get("edited", {}).items():
        marks[kind] = [Mark("edited", float(start), float(stop)) for start, stop in _runs(sorted(layers))]
    return marks


def _runs(layers: list[int]) -> Iterator[tuple[int, int]]:
    ends = [a for a, b in pairwise(layers) if b != a + 1] + layers[-1:]
    starts = layers[:1] + [b for a, b in pairwise(layers) if b != a + 1]
    return zip(starts, ends, strict=True)
