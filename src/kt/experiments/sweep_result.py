"""`Sweep`, the result of a sweep: a row a point, plain numbers, apart from any model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._util.data import complete_file, plain, read_json, write_json
from .._util.text import count, without_folders
from ..errors import BadFile, KtError
from ..report import Figure, Shown, Table
from ..runs.journal import SETTINGS, claim
from ..stats import Interval, paired_bootstrap_difference
from .grids import JOINT, Point

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from ..figures import Series


KIND = "sweep"


@dataclass(frozen=True)
class Row:
    """One point's figures.

    `metrics` has a mean, its 95% interval and n by metric; `values` what they rest on, by metric and record (means
    over seeds). `seconds`: of solving and of scoring, all seeds together. `settings`: the point's own options.
    """

    label: str
    series: str
    x: float
    edits: int
    settings: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, Any]]
    values: Mapping[str, Mapping[str, float]] = field(repr=False)
    seconds: Mapping[str, float] = field(compare=False)

    @property
    def n(self) -> int:
        """The most records that a metric rests on."""
        return max((int(metric["n"]) for metric in self.metrics.values()), default=0)

    def as_dict(self, whole: bool = False) -> dict[str, Any]:
        """For JSON; `whole` with the values by record."""
        values: dict[str, Any] = plain(asdict(self))
        if not whole:
            values.pop("values")
        return values | {"n": self.n}

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Row:
        """From what `as_dict(whole=True)` gave.

        Raises:
            TypeError: a field is missing, is another's, or is of another kind.
        """
        row = cls(**{name: value for name, value in content.items() if name not in ("n", "schema_version")})
        found: dict[str, Any] = vars(row)
        metrics, values = found["metrics"], found["values"]
        forms: dict[str, Any] = {"label": str, "series": str, "x": (int, float), "edits": int}
        wrong = [name for name, form in forms.items() if not isinstance(found[name], form)]
        wrong += [name for name in ("settings", "metrics", "values", "seconds") if not isinstance(found[name], dict)]
        if not wrong and not all(_is_interval(metric) for metric in metrics.values()):
            wrong = ["metrics"]
        if not wrong and not all(isinstance(each, dict) and _numbers(each.values()) for each in values.values()):
            wrong = ["values"]
        if not wrong and not _numbers(found["seconds"].values()):
            wrong = ["seconds"]
        if wrong:
            raise TypeError(f"{wrong[0]} has another form")
        return row


def _is_interval(metric: Any) -> bool:
    """A mean, its interval or none, and n, as `Interval.as_dict` gives them; a mean of nothing is None."""
    if not isinstance(metric, dict) or not {"mean", "ci95", "n"} <= metric.keys():
        return False
    ends = [] if metric["ci95"] is None else metric["ci95"]
    mean = [] if metric["mean"] is None else [metric["mean"]]
    return isinstance(ends, list) and len(ends) in (0, 2) and _numbers([*mean, *ends, metric["n"]])


def _numbers(values: Iterable[Any]) -> bool:
    """Numbers, or null for those that are none (NaN)."""
    return all(value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in values)


@dataclass(frozen=True)
class Sweep(Shown):
    """The result of `sweep`.

    Attributes:
        about: what was swept (`kind`), on which model and facts, and what each metric means (`protocol`).
        rows: one a setting, with metrics, intervals and the values by record.
        before: the unedited model's metrics on all facts.
        balance: the traced α, where one was asked for.
    """

    about: Mapping[str, Any]
    rows: tuple[Row, ...]
    before: Mapping[str, Mapping[str, Any]]
    balance: Mapping[str, Any] | None = None

    @property
    def kind(self) -> str:
        """The swept setting: `alpha`, `layers`, `edits`, `clamp`, `modules`, or a recipe's axis."""
        return str(self.about["kind"])

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The swept setting, the model and the facts."""
        return self.about

    def row(self, label: str, series: str | None = None) -> Row:
        """The row of the name `label`, of one `series` where there are several.

        Raises:
            KtError: there is none.
        """
        for row in self.rows:
            if row.label == label and series in (None, row.series):
                return row
        raise KtError(f"the sweep has no point {label!r}; it has {', '.join(row.label for row in self.rows)}")

    def difference(self, first: str, second: str, seed: int = 0) -> dict[str, Interval]:
        """first - second by metric, over the records that both have, paired, with a bootstrap interval.

        Args:
            first: label of a row.
            second: label of another.
            seed: of the bootstrap.
        """
        one, other = self.row(first).values, self.row(second).values
        differences = {}
        for name in (n for n in one if n in other):
            shared = [record for record in one[name] if record in other[name]]
            mine, theirs = ([values[name][record] for record in shared] for values in (one, other))
            differences[name] = paired_bootstrap_difference(mine, theirs, seed=seed)
        return differences

    def differences(self) -> dict[str, dict[str, Interval]]:
        """In a sweep of modules, the joint edit less each of its parts; empty in other sweeps."""
        if self.kind != "modules":
            return {}
        others = [row.label for row in self.rows if row.label != JOINT]
        return {f"{JOINT} - {other}": self.difference(JOINT, other) for other in others}

    def to_dataframe(self) -> pd.DataFrame:
        """One row a point and metric."""
        import pandas as pd

        lines = []
        for row in self.rows:
            common = {"series": row.series, "point": row.label, "x": row.x, "edits": row.edits}
            for name, metric in row.metrics.items():
                low, high = metric["ci95"] or (None, None)
                lines.append(
                    common | {"metric": name, "mean": metric["mean"], "low": low, "high": high, "n": metric["n"]}
                )
        return pd.DataFrame(lines, columns=["series", "point", "x", "edits", "metric", "mean", "low", "high", "n"])

    @property
    def heading(self) -> str:
        """The title of its section."""
        return f"Sweep of {self.kind}"

    def tables(self) -> Sequence[Table]:
        """A row a point, `A_TABLE` metrics a table; of modules also the joint edit less each of its parts."""
        note = ""
        if self.balance is not None:
            ends = self.balance.get("ci95")
            span = "" if ends is None else f" [{ends[0]:.3f}, {ends[1]:.3f}]"
            how = self.balance.get("source") or f"n = {self.balance['n_facts']}"
            note = f"traced α {self.balance['alpha']:.3f}{span}, {how}"
        title = f"{without_folders(self.about['model'])}: {self.kind}, {count(self.about['n_facts'], 'fact')}"
        shown = list(columns(self).items())
        parts = [dict(shown[i : i + A_TABLE]) for i in range(0, max(1, len(shown)), A_TABLE)]
        tables = []
        for part in parts:
            head = ["method", AXES.get(self.kind, self.kind), *part, "edits", "seconds"]
            rows = [
                [r.series, r.label, *(_mean(r, m) for m in part.values()), r.edits, round(sum(r.seconds.values()), 1)]
                for r in self.rows
            ]
            tables.append(Table(head, rows, title, note))
        gaps = self.differences()
        for part in parts if gaps else ():
            lines = [[name, *(by.get(metric) for metric in part.values())] for name, by in gaps.items()]
            tables.append(Table(["", *part], lines, "paired differences over the same records"))
        return tables

    def figures(self) -> Sequence[Figure]:
        """The metrics over the grid; none where the facts have nothing that the protocols ask for."""
        return [Figure(self.figure(), name=self.kind)] if columns(self) else []

    def figure(self) -> go.Figure:
        """One panel a metric, one line a series (or, where points are names, one marker a point); a traced α marked."""
        from ..figures.sweep import Traced, sweep_figure

        traced = None
        if self.balance is not None and self.kind == "alpha":
            ci95 = self.balance.get("ci95")
            traced = Traced(float(self.balance["alpha"]), None if ci95 is None else (float(ci95[0]), float(ci95[1])))
        named, shown = self.kind in NAMED, columns(self)
        runs = _by_point(self) if named else _by_series(self)
        return sweep_figure(
            runs,
            title=f"{without_folders(self.about['model'])}: {AXES.get(self.kind, self.kind)}",
            subtitle=f"{count(self.about['n_facts'], 'fact')}; means over records with 95% intervals{_how(shown)}",
            x_title=AXES.get(self.kind, "point"),
            scale="log" if self.kind == "edits" else "linear",
            names=[row.label for row in self.rows] if named else (),
            traced=traced,
        )

    def as_dict(self, whole: bool = False) -> dict[str, Any]:
        """For `--json`: `rows`, the settings, the unedited model's metrics, the balance and the differences; `whole`
        adds the values by record.
        """
        return {
            **plain(dict(self.about)),
            "rows": [row.as_dict(whole) for row in self.rows],
            "before": plain(dict(self.before)),
            "balance": None if self.balance is None else plain(dict(self.balance)),
            "differences": plain(self.differences()),
        }

    def save(self, path: str | Path) -> Path:
        """Write the sweep to `path` as JSON, with the values by record."""
        content = {"about": self.about, "before": self.before, "balance": self.balance}
        return write_json(path, {"what": KIND, **content, "rows": [row.as_dict(whole=True) for row in self.rows]})

    @classmethod
    def load(cls, path: str | Path) -> Sweep:
        """Read the sweep that `save` wrote to `path`.

        Raises:
            BadFile: it is something else.
        """
        content = read_json(path)
        if content.get("what") != KIND:
            raise BadFile(f"{path}: not a sweep; give what Sweep.save or kt sweep wrote")
        with complete_file(path, "sweep", "run it again"):
            return cls(
                content["about"], tuple(Row.of(row) for row in content["rows"]), content["before"], content["balance"]
            )

    def __repr__(self) -> str:
        return f"Sweep({self.kind}: {count(len(self.rows), 'point')}, {self.about.get('n_facts')} facts)"


# The points of a sweep as files: each is written when it is done, so an interrupted sweep loses at most one.
#
#     FOLDER/settings.json          what was swept; a sweep that goes on must have the same
#     FOLDER/points/000-0.1.json    one finished point, with its values by record
#
# Until the sweep is done, `manifest.json` says so; a finished run folder of `kt sweep` holds the same files.

POINTS = "points"


class Kept:
    """Rows by point, in a folder or (without one) nowhere.

    Args:
        settings: what was swept; must be the same when a sweep goes on.
        beside: what else the settings file holds, to be read and not compared (a traced α).

    Raises:
        KtError: `resume` names a folder without a sweep, or the sweep there had other settings; or, without `resume`,
            the folder holds one already.
    """

    def __init__(
        self,
        folder: str | Path | None,
        settings: Mapping[str, Any],
        resume: bool,
        beside: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.settings, self.beside = plain(dict(settings)), plain(dict(beside or {}))
        self._begun = False
        if self.folder is None:
            if resume:
                raise KtError("resume needs the folder of the sweep that is to go on: give folder=")
            return
        self._begun = claim(self.folder, self.settings, resume, "sweep")

    def row(self, number: int, point: Point, require: Callable[[Row], None] = lambda row: None) -> Row | None:
        """The finished row of a point; `require` raises ValueError where it lacks what its reader needs."""
        if self.folder is None or not (path := self._path(number, point)).exists():
            return None
        with complete_file(path, "point", "delete it, and it is done again"):
            row = Row.of(read_json(path))
            require(row)
            return row

    def add(self, number: int, point: Point, row: Row) -> None:
        if self.folder is None:
            return
        self.begin()
        write_json(self._path(number, point), row.as_dict(whole=True))

    def begin(self) -> None:
        """Write the settings, with the first thing that is kept and not before: a sweep that fails at once leaves
        nothing behind."""
        if self.folder is not None and not self._begun:
            write_json(self.folder / SETTINGS, self.beside | self.settings)
            self._begun = True

    def _path(self, number: int, point: Point) -> Path:
        assert self.folder is not None
        slug = re.sub(r"[^A-Za-z0-9.,]+", "-", f"{point.series}-{point.label}").strip("-")[:60]
        return self.folder / POINTS / f"{number:03d}-{slug}.json"


# A sweep as a figure and as rows of a table: which metrics, under which names, over which axis.

SHOWN = {
    "edit success": "edit_success_tf_exact",
    "paraphrase": "paraphrase_tf_exact",
    "locality": "neighbourhood_same_argmax",
    "portability": "portability_tf_exact",
    "fluency (bits)": "fluency_ngram_entropy_gen",
}
"""Panels and columns, and the metric behind each: those of the default protocols, tf and gen."""
ASKED = {
    "P(new) > P(old)": "efficacy_prob_success",
    "P(new) > P(old), rephrased": "generalization_prob_success",
    "P(own) > P(new), neighbours": "specificity_prob_success",
    "free answer": "edit_success_wild_contains",
    "free answer, rephrased": "paraphrase_wild_contains",
    "free answer, neighbours": "neighbourhood_wild_contains",
    "perplexity": "perplexity_heldout",
}
"""Panels of the protocols prob, wild and ppl."""
GREEDY = {"greedy text": "edit_success_gen_exact", "greedy text, rephrased": "paraphrase_gen_exact"}
"""Panels of gen in a sweep without tf."""
A_TABLE = 5

AXES = {
    "alpha": "α, attention's share",
    "layers": "layers",
    "edits": "edits in one batch",
    "clamp": "clamp ratio γ",
    "modules": "modules",
}
NAMED = ("layers", "modules")
"""Kinds whose points are names, not numbers."""


def _how(shown: Mapping[str, str]) -> str:
    """Which panels are teacher-forced, and which are means over something else than records."""
    if set(shown) <= set(SHOWN):
        return ", teacher-forced"
    forced = "; edit success, paraphrase, portability: teacher-forced" * ("edit success" in shown)
    return forced + "; perplexity: over documents" * ("perplexity" in shown)


def columns(sweep: Sweep) -> dict[str, str]:
    """The panels that at least one row has something for."""
    measured = {name for row in sweep.rows for name, metric in row.metrics.items() if metric["n"]}
    greedy = {} if SHOWN["edit success"] in measured else GREEDY
    return {panel: name for panel, name in (greedy | SHOWN | ASKED).items() if name in measured}


def _mean(row: Row, metric: str) -> Interval | None:
    """A metric's mean with its interval; None where the row has nothing for it."""
    return Interval.of(value) if (value := row.metrics.get(metric)) else None


def _by_series(sweep: Sweep) -> dict[str, dict[str, Series]]:
    """{series: {panel: its line}}."""
    runs: dict[str, dict[str, Series]] = {}
    for name in dict.fromkeys(row.series for row in sweep.rows):
        rows = sorted((row for row in sweep.rows if row.series == name), key=lambda row: row.x)
        runs[name] = {panel: _line(panel, rows, metric) for panel, metric in columns(sweep).items()}
    return runs


def _by_point(sweep: Sweep) -> dict[str, dict[str, Series]]:
    """{point: {panel: its marker}}."""
    shown = columns(sweep).items()
    return {row.label: {panel: _line(panel, [row], metric) for panel, metric in shown} for row in sweep.rows}


def _line(panel: str, rows: list[Row], metric: str) -> Series:
    from ..figures import Series

    mean, low, high, n = (
        np.array(part) for part in zip(*(Interval.of(r.metrics.get(metric)) for r in rows), strict=True)
    )
    return Series(panel, [row.x for row in rows], mean, low, high, n)
