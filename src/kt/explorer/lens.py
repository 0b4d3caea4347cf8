"""The old and the new answer through the layers, by fact and as means, and the most probable tokens of each cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy import ndarray

from .._util.text import visible
from ..probing import Probe
from ..probing.lens import TOP
from ..probing.result import KIND_TITLES, POSITION_TITLES
from ..residual import Residual
from .numbers import COARSE, short, whole
from .rows import Rows
from .seen import Seen

POINTS = {"rank": "median", "prob": "mean"}
"""Metric -> what stands for several facts."""
MOST = 220_000
"""Most probable tokens on a page: of many facts, fewer of each cell are shown, so that 200 facts stay under 5 MB."""


@dataclass
class Tops:
    """The most probable tokens of cells: their texts, each once, and by state and fact where they were read."""

    texts: list[str] = field(default_factory=list)
    place: dict[str, int] = field(default_factory=dict)
    first: dict[tuple[int, str], list[Any]] = field(default_factory=dict)
    each: int = TOP

    def token(self, number: int, texts: Mapping[str, str]) -> int:
        """The place of a token's text in `texts`."""
        text = visible(texts.get(str(number), f"token {number}"))
        if text not in self.place:
            self.place[text] = len(self.texts)
            self.texts.append(text)
        return self.place[text]

    def cells(self, fact: int, at: str, ids: ndarray, prob: ndarray, texts: Mapping[str, str]) -> list[Any]:
        """[kind][layer] of tokens, then their probabilities; 0 where the first state has the same."""
        ids, prob = ids[..., : self.each], prob[..., : self.each]
        numbers, place = np.unique(ids, return_inverse=True)
        named = np.array([self.token(int(number), texts) for number in numbers])[place.reshape(ids.shape)]
        found = [
            [[*tokens, *shares] for tokens, shares in zip(*both, strict=True)]
            for both in zip(named.tolist(), whole(prob, COARSE), strict=True)
        ]
        if (fact, at) not in self.first:
            self.first[fact, at] = found
            return found
        was = self.first[fact, at]
        return [[0 if a == b else a for a, b in zip(*rows, strict=True)] for rows in zip(found, was, strict=True)]


def lens(named: Sequence[tuple[str, Probe | Residual]], rows: Rows, seen: Sequence[Seen] = ()) -> dict[str, Any] | None:
    """All readings of the runs by state (`before`, `after`, or a run's name), the later runs filling what is missing.

    A probe alone reads a model as it is: `before`, unless an edit's own readings give that, or another run did.
    """
    states: dict[str, dict[str, Any]] = {}
    probes: list[tuple[str, Probe]] = []
    for name, result in named:
        if isinstance(result, Residual):
            probes += [("before", result.before), ("after", result.after)]
        else:
            probes.append((name, result))
    layers: tuple[int, ...] = ()
    cells = sum(probe.reading.top[..., 0].size for _, probe in probes if probe.reading.top is not None)
    tops = Tops(each=int(np.clip(MOST // max(1, cells), 1, TOP)))
    for name, probe in probes:
        if layers and probe.layers != layers:
            continue  # another model's; its figures are in the report
        layers = probe.layers
        state = states.setdefault(
            name, {"name": name, "facts": {}, "tops": {}, "mean": _mean(probe), "n": int(probe.counted.sum())}
        )
        for i, fact in enumerate(probe.facts):
            place = rows.index(fact)
            if place not in state["facts"]:
                state["facts"][place] = _fact(probe, i)
                state["tops"][place] = _tops(probe, i, tops, place)
    for each in seen:
        known = states[each.state]["tops"].get(rows.place.get(each.prompt)) if each.state in states else None
        if known is not None:
            for row, (top, prob) in enumerate(zip(each.top, each.top_prob, strict=True)):
                known["at"][str(row)] = tops.cells(rows.place[each.prompt], str(row), top, prob, each.texts)
    if not states:
        return None
    return {
        "layers": list(layers),
        "positions": POSITION_TITLES,
        "kinds": KIND_TITLES,
        "tokens": tops.texts,
        "states": list(states.values()),
    }


def _fact(probe: Probe, i: int) -> dict[str, Any]:
    """rank and prob by position, kind, answer and layer."""
    reading = probe.reading
    return {
        "rank": reading.rank[i].transpose(0, 1, 3, 2).tolist(),
        "prob": short(reading.prob[i].transpose(0, 1, 3, 2)),
    }


def _tops(probe: Probe, i: int, tops: Tops, place: int) -> dict[str, Any] | None:
    """The most probable tokens by position, and where both answers' first tokens stand in the list of texts."""
    reading, texts = probe.reading, probe.metadata.get("tokens", {})
    if reading.top is None or reading.top_prob is None:
        return None
    found = {
        at: tops.cells(place, at, reading.top[i, p], reading.top_prob[i, p], texts)
        for p, at in enumerate(probe.positions)
    }
    fact = probe.facts[i]
    named = [texts.get(str(token)) for token in (fact.original_id, fact.target_id)]
    answers = [None if text is None else tops.place.get(visible(text)) for text in named]
    return {"at": found, "answers": answers}


def _mean(probe: Probe) -> dict[str, Any]:
    """The same over the probe's facts: median ranks, mean probabilities."""
    return {
        metric: [
            [
                [short(probe.curve(kind, position, answer, metric, statistic).mean) for answer in probe.answers]
                for kind in probe.kinds
            ]
            for position in probe.positions
        ]
        for metric, statistic in POINTS.items()
    }
