"""The course of edits in steps: scores and weight norms by number of edits, as plain numbers, apart from any model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artifacts import read_json, whole, write_json
from .errors import BadFile

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

MODES = ("batch", "single", "sequential")
EVALUATE = ("none", "end", "step")
KIND = "edit steps"
SHOWN = {
    "edit_success_tf_exact": "edit success",
    "paraphrase_tf_exact": "paraphrase",
    "neighbourhood_same_argmax": "locality",
    "portability_tf_exact": "portability",
}
"""The metrics of the figure, all between 0 and 1, and their panels."""
ASKED = {"neighbourhood_kl": "KL of neighbours (nats)"}
"""Those that are there where they were asked for; without an upper end."""


@dataclass(frozen=True)
class Step:
    """One solve: its requests, how many were edited by then, and each weight's norm over its norm before the first.

    `metrics` are of all requests so far (in single mode: of this one), where the step was scored.
    """

    number: int
    edits: int
    requests: tuple[str, ...]
    norm_ratios: Mapping[str, float]
    metrics: Mapping[str, Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Steps:
    """The course of a run: plain numbers, apart from any model."""

    mode: str
    about: Mapping[str, Any]
    steps: tuple[Step, ...]

    def figure(self) -> go.Figure:
        """Metrics and weight norms by number of edits."""
        name = str(self.about.get("label", self.about.get("method", "edit")))
        title = f"{self.steps[-1].edits} edits, {self.mode}"
        return steps_figure({name: self}, title, "all requests so far, teacher-forced")

    def to_dataframe(self) -> pd.DataFrame:
        """One row a step and metric; the weight norms as metrics named after their weight."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for step in self.steps:
            place = {"step": step.number, "edits": step.edits}
            for name, value in (step.metrics or {}).items():
                low, high = value["ci95"] or (None, None)
                rows.append(place | {"metric": name, "mean": value["mean"], "low": low, "high": high, "n": value["n"]})
            for name, ratio in step.norm_ratios.items():
                rows.append(place | {"metric": f"norm ratio of {name}", "mean": ratio})
        return pd.DataFrame(rows, columns=["step", "edits", "metric", "mean", "low", "high", "n"])

    def as_dict(self) -> dict[str, Any]:
        return {"mode": self.mode, "about": dict(self.about), "steps": [asdict(step) for step in self.steps]}

    def save(self, path: str | Path) -> Path:
        """Write JSON."""
        return write_json(path, {"kind": KIND} | self.as_dict())

    @classmethod
    def of(cls, held: Mapping[str, Any]) -> Steps:
        """From what `as_dict` gave."""
        steps = (Step(**(step | {"requests": tuple(step["requests"])})) for step in held["steps"])
        return cls(held["mode"], held["about"], tuple(steps))

    @classmethod
    def load(cls, path: str | Path) -> Steps:
        """Read what `save` wrote.

        Raises:
            BadFile: it is something else.
        """
        held = read_json(path)
        if held.get("kind") != KIND:
            found = held.get("kind") or "other JSON"
            raise BadFile(f"{path}: holds {found}, expected {KIND}; give what a sequential kt apply-edit wrote")
        with whole(path, "course of edits", "run the edit again"):
            return cls.of(held)


def steps_figure(runs: Mapping[str, Steps], title: str, subtitle: str = "") -> go.Figure:
    """One line a run: metrics with 95% intervals, and the largest norm ratio over its weights, by number of edits."""
    from .figures import steps_figure as draw

    return draw({name: _panels(run) for name, run in runs.items()}, title=title, subtitle=subtitle)


def _panels(run: Steps) -> dict[str, Any]:
    import numpy as np

    from .figures import Series
    from .figures.steps import NORM_RATIO

    panels = {}
    scored = [step for step in run.steps if step.metrics]
    for name, panel in (SHOWN | ASKED).items():
        here = [step for step in scored if name in (step.metrics or {})]
        if here:
            cells = [(step.metrics or {})[name] for step in here]
            bounds = np.array([c["ci95"] or (np.nan, np.nan) for c in cells], dtype=float)
            means, counts = [c["mean"] for c in cells], [c["n"] for c in cells]
            edits = [step.edits for step in here]
            panels[panel] = Series(panel, edits, np.array(means, float), bounds[:, 0], bounds[:, 1], np.array(counts))
    largest = [max(step.norm_ratios.values(), default=1.0) for step in run.steps]
    panels[NORM_RATIO] = Series(NORM_RATIO, [step.edits for step in run.steps], np.array(largest))
    return panels
