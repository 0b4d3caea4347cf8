"""Scores: every metric with n and interval, the values per record, and the raw samples behind them."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..artifacts import read_json, write_json
from ..errors import BadFile
from ..stats import Interval, bootstrap_mean_grid
from .samples import Sample

if TYPE_CHECKING:
    import pandas as pd

KIND = "scores"
_TUPLES = ("target_ids", "predicted_ids")


class Row(NamedTuple):
    """A line of the printed table."""

    metric: str
    mean: str
    ci95: str
    n: str


@dataclass(frozen=True)
class Scores:
    """What `evaluate` returns.

    Args:
        model: the model's name.
        records: ids of the facts, in their order.
        samples: the raw responses.
        values: metric -> record -> value; a record is absent where the metric has nothing to say about it.
        protocol: what each metric means and how it was measured, one sentence each.
        seed: of the sampled texts and of the bootstrap.
        compared: whether locality was measured against another run; such scores cannot be a `before`.
    """

    model: str
    records: tuple[str, ...]
    samples: tuple[Sample, ...]
    values: Mapping[str, Mapping[str, float]]
    protocol: Mapping[str, str]
    seed: int = 0
    compared: bool = False

    @cached_property
    def metrics(self) -> dict[str, Interval]:
        """Mean over records, 95% bootstrap interval over records (`.ci95`), number of records (`.n`)."""
        if not self.values:
            return {}
        table = np.array([[v.get(r, np.nan) for v in self.values.values()] for r in self.records])
        grid = bootstrap_mean_grid(table, seed=self.seed)
        columns = zip(self.values, grid.mean, grid.low, grid.high, grid.n, strict=True)
        return {name: Interval(float(m), float(lo), float(hi), int(n)) for name, m, lo, hi, n in columns}

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """Scores of different records, measured alike, as one: each record under its own edit."""
        values: dict[str, dict[str, float]] = {}
        for part in parts:
            for name, by_record in part.values.items():
                values.setdefault(name, {}).update(by_record)
        records = tuple(record for part in parts for record in part.records)
        samples = tuple(sample for part in parts for sample in part.samples)
        protocol = {name: says for part in parts for name, says in part.protocol.items()}
        return replace(parts[0], records=records, samples=samples, values=values, protocol=protocol)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per record and metric."""
        import pandas as pd

        rows = [(r, name, v[r]) for name, v in self.values.items() for r in self.records if r in v]
        return pd.DataFrame(rows, columns=["record", "metric", "value"])

    def samples_to_dataframe(self) -> pd.DataFrame:
        """The raw responses, one row per sample."""
        import pandas as pd

        return pd.DataFrame([asdict(s) for s in self.samples], columns=[f.name for f in fields(Sample)])

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: metrics.<name> = {mean, ci95, n} and the protocol, without the raw samples."""
        metrics = {name: metric.as_dict() for name, metric in self.metrics.items()}
        return {
            "model": self.model,
            "n_records": len(self.records),
            "metrics": metrics,
            "protocol": self.protocol,
        }

    def table(self) -> list[Row]:
        """Rows of text for a terminal or a report; means that are no probabilities keep their unit (bits)."""
        return [Row(name, _number(m.mean), _span(m), str(m.n)) for name, m in self.metrics.items()]

    def save(self, path: str | Path) -> Path:
        """Write one JSON file, whole or not at all."""
        content = {
            **self.as_dict(),
            "kind": KIND,
            "seed": self.seed,
            "compared": self.compared,
            "records": self.records,
            "values": self.values,
            "samples": [asdict(sample) for sample in self.samples],
        }
        return write_json(path, content)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what `save` wrote.

        Raises:
            BadFile: it is not there, or not the scores of a version that this one reads.
        """
        data = read_json(path)
        if data.get("kind") != KIND or data.get("schema_version") != 1:
            raise BadFile(f"{path}: no scores of schema version 1; give a file written by Scores.save or `kt eval`")
        try:
            return cls(
                model=data["model"],
                records=tuple(data["records"]),
                samples=tuple(_sample(s) for s in data["samples"]),
                values={name: data["values"][name] for name in _in_order(data["values"])},
                protocol=data["protocol"],
                seed=data["seed"],
                compared=data["compared"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise BadFile(f"{path}: scores with a missing or wrong part ({error}); save them again") from error

    def __repr__(self) -> str:
        return f"Scores({self.model}: {len(self.records)} records, {len(self.metrics)} metrics)"

    def _repr_html_(self) -> str:
        head = "".join(_cell(name, "th") for name in Row._fields)
        lines = [
            f'<tr title="{html.escape(self.protocol.get(row.metric, ""))}">{"".join(map(_cell, row))}</tr>'
            for row in self.table()
        ]
        caption = html.escape(f"{self.model}: {len(self.records)} records")
        return f"<table><caption>{caption}</caption><tr>{head}</tr>{''.join(lines)}</table>"


def _cell(text: str, tag: str = "td") -> str:
    return f'<{tag} style="text-align:left">{html.escape(text)}</{tag}>'


def _in_order(values: Mapping[str, Any]) -> list[str]:
    """Metrics in the order of their table: JSON files have their keys sorted."""
    from .metrics import METRICS

    return [n for n in METRICS if n in values] + sorted(n for n in values if n not in METRICS)


def _sample(data: Mapping[str, Any]) -> Sample:
    parts: dict[str, Any] = {key: tuple(value) if key in _TUPLES else value for key, value in data.items()}
    return Sample(**parts)


def _number(value: float) -> str:
    return "n/a" if value != value else f"{value:.3f}"


def _span(metric: Interval) -> str:
    return "n/a" if metric.ci95 is None else f"{metric.low:.3f} to {metric.high:.3f}"
