"""A residual as a table, a figure, a summary in a notebook, and as the two probes that it rests on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from .._util.data import plain
from .._util.text import html_table
from ..errors import BadFact
from ..probing.lens import KINDS, POSITIONS
from ..probing.stages import CONTROLS, NEW, OLD, mean_visibility, visibility
from ..stats import Interval, bootstrap_mean_grid
from .attacks import STATES
from .score import ANSWERS, Residual

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from ..figures import Mark, Series


METRICS = ("rank", "prob")
_NAMES = {"original": "old answer", "target": "new answer", "control": "other answers of the relation"}


def answers(residual: Residual, state: str, metric: str) -> Float[ndarray, "fact position kind layer answer"]:
    """Old, new and mean control by cell: the probability, or the rank (see `Residual.to_dataframe`)."""
    reading = residual.readings[state]
    if metric == "prob":
        prob = reading.prob.astype(np.float64)
        there = ~np.isnan(prob[..., CONTROLS])
        n = there.sum(-1)
        total = np.where(there, prob[..., CONTROLS], 0.0).sum(-1)
        return np.stack([prob[..., OLD], prob[..., NEW], np.where(n > 0, total / np.maximum(n, 1), np.nan)], -1)
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


def as_dict(residual: Residual) -> dict[str, Any]:
    """See `Residual.as_dict`."""
    n_boot, seed = residual.metadata["n_boot"], residual.metadata["seed"]
    return {
        "residual_score": residual.score.as_dict(),
        "floor": residual.floor.as_dict(),
        "above_floor": residual.above_floor.as_dict(),
        "n_facts": len(residual.facts),
        "by_kind": {k: {p: _plain(found) for p, found in places.items()} for k, places in residual.by_kind.items()},
        "carrier": None if residual.carrier is None else _plain(residual.carrier),
        "in_top": plain(residual.in_top),
        "attacks": [_plain(row) for row in residual.attacks.rows(seed, n_boot)],
        "left_out": [fact._asdict() for fact in residual.left_out],
        **residual.metadata,
    }


def _plain(row: NamedTuple) -> dict[str, Any]:
    return {name: plain(value) for name, value in row._asdict().items()}


def to_dataframe(residual: Residual) -> pd.DataFrame:
    """See `Residual.to_dataframe`."""
    import pandas as pd

    prob, rank = (np.stack([answers(residual, s, m) for s in STATES], 4) for m in ("prob", "rank"))
    facts = [f.index for f in residual.facts]
    labels = (facts, POSITIONS, KINDS, residual.layers, STATES, ANSWERS)
    index = pd.MultiIndex.from_product(labels, names=["fact", "position", "kind", "layer", "state", "answer"])
    frame = pd.DataFrame({"prob": prob.reshape(-1), "rank": rank.reshape(-1)}, index=index).reset_index()
    return frame[["fact", "kind", "position", "layer", "state", "answer", "prob", "rank"]].dropna(ignore_index=True)


class AttackLine(NamedTuple):
    """One attack on the edited model: how often an answer beats the new one, and by what factor the old one leads.

    `lead_before` and `lead` are ln P(old) - ln P(third) in nats on the unedited and the edited model.
    """

    attack: str
    old: Interval
    third: Interval
    excess: Interval
    lead_before: Interval
    lead: Interval


def attack_lines(residual: Residual) -> list[AttackLine]:
    """The attacks as people read them; `Residual.attacks` has the rest."""
    n_boot, seed = int(residual.metadata["n_boot"]), int(residual.metadata["seed"])
    found = []
    for name in residual.attacks.names:
        beats = residual.attacks.row(name, "beats_new", "after", seed, n_boot)
        leads = [residual.attacks.row(name, "log_ratio", state, seed, n_boot).excess for state in STATES]
        found.append(AttackLine(name, beats.old, beats.third, beats.excess, *leads))
    return found


def figure(residual: Residual, position: str, metric: str) -> go.Figure:
    """See `Residual.figure`."""
    from ..figures.probe import before_after_probe

    for given, known in ((position, POSITIONS), (metric, METRICS)):
        if given not in known:
            raise BadFact(f"{given!r} is not drawn; choose among {', '.join(known)}")
    before, after = ({kind: _lines(residual, s, kind, position, metric) for kind in KINDS} for s in STATES)
    place = {"subject_last": "at the subject's last token", "prediction": "at the prediction position"}[position]
    floor = "" if np.isnan(residual.floor.mean) else f"never learnt {residual.floor.mean:.3f}"
    y_title = "rank, geometric mean" if metric == "rank" else "mean probability"
    return before_after_probe(
        before,
        after,
        title=f"The old fact before and after the edit, {place}",
        subtitle=" · ".join(filter(None, (floor, _edit_words(residual)))),
        score=residual.score,
        metric=metric,
        y_title=y_title,
        marks=_edited(residual),
    )


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
    return f"{about['model']}, {about.get('method') or 'edit'}{share}"


def _edited(residual: Residual) -> dict[str, list[Mark]]:
    """The stretches of layers whose weights the edit changed, in the row of their kind."""
    from ..figures import Mark

    found = {}
    for kind, layers in residual.metadata.get("edited", {}).items():
        found[kind] = [Mark("edited", float(start), float(stop)) for start, stop in _runs(sorted(layers))]
    return found


def _runs(layers: list[int]) -> Iterator[tuple[int, int]]:
    ends = [a for a, b in pairwise(layers) if b != a + 1] + layers[-1:]
    starts = layers[:1] + [b for a, b in pairwise(layers) if b != a + 1]
    return zip(starts, ends, strict=True)


def summary_html(residual: Residual) -> str:
    """Score, floor, what is left by kind, and what brings the old answer back."""
    rows = [
        ("residual score", residual.score),
        ("the same of what was never learnt", residual.floor),
        ("difference", residual.above_floor),
    ]
    rows += [(f"left in {k}", places["both"].score) for k, places in residual.by_kind.items()]
    seed, n_boot = residual.metadata["seed"], residual.metadata["n_boot"]
    for name in residual.attacks.names:
        found = residual.attacks.row(name, seed=seed, n_boot=n_boot)
        rows += [
            (f"old beats new, {name}", found.old),
            (f"old beats new, {name}, more than a third answer", found.excess),
        ]
    return html_table(f"{_edit_words(residual)}: {len(residual.facts)} facts; {residual.why_left_out()}", (), rows)
