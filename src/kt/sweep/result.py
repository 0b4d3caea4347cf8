"""What a sweep found: a row a point, as plain numbers, apart from any model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifacts import plain, read_json, whole, write_json
from ..errors import BadFile, KtError
from ..stats import Interval, paired_bootstrap_difference

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

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
        found: dict[str, Any] = plain(asdict(self))
        if not whole:
            found.pop("values")
        return found | {"n": self.n}

    @classmethod
    def of(cls, held: Mapping[str, Any]) -> Row:
        """From what `as_dict(whole=True)` gave."""
        return cls(**{name: value for name, value in held.items() if name not in ("n", "schema_version")})


@dataclass(frozen=True)
class Sweep:
    """What `sweep` returns.

    `about` says what was swept (`kind`), on which model and facts, and what each metric means (`protocol`); `before`
    holds the unedited model's metrics on all facts, `balance` the traced α where one was asked for.
    """

    about: Mapping[str, Any]
    rows: tuple[Row, ...]
    before: Mapping[str, Mapping[str, Any]]
    balance: Mapping[str, Any] | None = None

    @property
    def kind(self) -> str:
        return str(self.about["kind"])

    def row(self, label: str, series: str | None = None) -> Row:
        """The row of a name.

        Raises:
            KtError: there is none.
        """
        for row in self.rows:
            if row.label == label and series in (None, row.series):
                return row
        raise KtError(f"the sweep has no point {label!r}; it has {', '.join(row.label for row in self.rows)}")

    def difference(self, first: str, second: str, seed: int = 0) -> dict[str, Interval]:
        """first - second by metric, over the records that both have, paired, with a bootstrap interval."""
        one, other = self.row(first).values, self.row(second).values
        found = {}
        for name in (n for n in one if n in other):
            shared = [record for record in one[name] if record in other[name]]
            mine, theirs = ([values[name][record] for record in shared] for values in (one, other))
            found[name] = paired_bootstrap_difference(mine, theirs, seed=seed)
        return found

    def differences(self) -> dict[str, dict[str, Interval]]:
        """In a sweep of modules, what the joint edit is more than each part; nothing in other sweeps."""
        from .grids import JOINT

        if self.kind != "modules":
            return {}
        others = [row.label for row in self.rows if row.label != JOINT]
        return {f"{JOINT} - {other}": self.difference(JOINT, other) for other in others}

    def to_dataframe(self) -> pd.DataFrame:
        """One row a point and metric."""
        import pandas as pd

        found = []
        for row in self.rows:
            place = {"series": row.series, "point": row.label, "x": row.x, "edits": row.edits}
            for name, metric in row.metrics.items():
                low, high = metric["ci95"] or (None, None)
                found.append(
                    place | {"metric": name, "mean": metric["mean"], "low": low, "high": high, "n": metric["n"]}
                )
        return pd.DataFrame(found, columns=["series", "point", "x", "edits", "metric", "mean", "low", "high", "n"])

    def figure(self) -> go.Figure:
        """Metrics over the grid with 95% bands; a traced α as a mark."""
        from .show import figure

        return figure(self)

    def as_dict(self, whole: bool = False) -> dict[str, Any]:
        """For `--json`: `rows`, and what they are to be read beside."""
        return {
            **plain(dict(self.about)),
            "rows": [row.as_dict(whole) for row in self.rows],
            "before": plain(dict(self.before)),
            "balance": None if self.balance is None else plain(dict(self.balance)),
            "differences": plain(self.differences()),
        }

    def save(self, path: str | Path) -> Path:
        """Write JSON with the values by record."""
        held = {"about": self.about, "before": self.before, "balance": self.balance}
        return write_json(path, {"what": KIND, **held, "rows": [row.as_dict(whole=True) for row in self.rows]})

    @classmethod
    def load(cls, path: str | Path) -> Sweep:
        """Read what `save` wrote.

        Raises:
            BadFile: it is something else.
        """
        held = read_json(path)
        if held.get("what") != KIND:
            raise BadFile(f"{path}: not a sweep; give what Sweep.save or kt sweep wrote")
        with whole(path, "sweep", "run it again"):
            return cls(held["about"], tuple(Row.of(row) for row in held["rows"]), held["before"], held["balance"])

    def __repr__(self) -> str:
        return f"Sweep({self.kind}: {len(self.rows)} points, {self.about.get('n_facts')} facts)"
