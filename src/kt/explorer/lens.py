"""Rank and probability of the old and the new answer through the layers, by fact and as means, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..probing import Probe
from ..probing.result import KIND_TITLES, POSITION_TITLES
from ..residual import Residual
from .numbers import short
from .rows import Rows

POINTS = {"rank": "median", "prob": "mean"}
"""Metric -> what stands for several facts."""


def lens(named: Sequence[tuple[str, Probe | Residual]], rows: Rows) -> dict[str, Any] | None:
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
    for name, probe in probes:
        if layers and probe.layers != layers:
            continue  # another model's; its figures are in the report
        layers = probe.layers
        state = states.setdefault(
            name, {"name": name, "facts": {}, "mean": _mean(probe), "n": int(probe.counted.sum())}
        )
        for i, fact in enumerate(probe.facts):
            state["facts"].setdefault(rows.index(fact), _fact(probe, i))
    if not states:
        return None
    return {
        "layers": list(layers),
        "positions": POSITION_TITLES,
        "kinds": KIND_TITLES,
        "states": list(states.values()),
    }


def _fact(probe: Probe, i: int) -> dict[str, Any]:
    """rank and prob by position, kind, answer and layer."""
    reading = probe.reading
    return {
        "rank": reading.rank[i].transpose(0, 1, 3, 2).tolist(),
        "prob": short(reading.prob[i].transpose(0, 1, 3, 2)),
    }


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
