"""Scores: every metric with n and interval, the values per record, and the raw samples behind them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from .._util.data import complete_file, read_json, write_json
from .._util.kinds import takes
from .._util.text import count, without_folders
from ..errors import BadFact, BadFile
from ..report import Shown, Table
from ..runs.folder import FILES
from ..stats import Interval, bootstrap_mean_grid, bootstrap_of_means
from .metrics import COMPOSITES, METRICS, PERPLEXITY, base_of, columns, composites, harmonic
from .perplexity import Heldout
from .samples import Sample
from .text import normalised

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from ..facts.fact import Fact


# Two methods on the same records: paired bootstrap differences of every metric that both have.


def differences(first: Scores, second: Scores, seed: int = 0) -> dict[str, Interval]:
    """mean(first - second) of each metric over the records that have it in both, resampled together.

    Composites and perplexity are differences of the figures themselves, from draws that both share.

    Raises:
        BadFact: the two are of different records, ask different questions about them, or read different texts.
    """
    _refuse_others(first, second)
    names = [name for name in first.values if name in second.values]
    intervals: dict[str, Interval] = {}
    if names:
        gap = columns(first.values, names, first.records) - columns(second.values, names, first.records)
        grid = bootstrap_mean_grid(gap, seed=seed)
        intervals = {name: grid.cell(i) for i, name in enumerate(names) if grid.n[i]}
    for name, (parts, _) in COMPOSITES.items():
        if set(parts) <= set(names):
            both = [columns(s.values, parts, first.records) for s in (first, second)]
            intervals[name] = bootstrap_of_means(np.concatenate(both, axis=1), _harmonic_gap, seed=seed)
    if first.heldout is not None and second.heldout is not None:
        intervals[PERPLEXITY] = first.heldout.difference(second.heldout, seed)
    return intervals


def _harmonic_gap(means: Float[ndarray, "draw column"]) -> Float[ndarray, " draw"]:
    """The harmonic mean of the first half of the columns less that of the second."""
    half = means.shape[1] // 2
    return harmonic(means[:, :half]) - harmonic(means[:, half:])


def _refuse_others(first: Scores, second: Scores) -> None:
    one, two = set(first.records), set(second.records)
    if one != two:
        raise BadFact(
            f"scores of different records do not compare: {len(one - two)} of {len(one)} are only in the first, "
            f"{len(two - one)} of {len(two)} only in the second; score both on the same facts"
        )
    questions, other = ({(s.record, *s.key) for s in scores.samples} for scores in (first, second))
    if questions != other:
        record = min(str(r[0]) for r in questions ^ other)
        raise BadFact(
            f"the two scores ask different questions about the same records, {record!r} among them; "
            "score both on one facts file"
        )


KIND = "scores"
OF_TARGET = ("edit", "answer", "paraphrase", "portability")
"""Roles whose scores say whether an edit holds; of records that it was not asked for they would say nothing."""
NO_SHARES = ("fluency_ngram_entropy_gen", "text_words_gen", "neighbourhood_kl", PERPLEXITY)
"""Metrics that have a unit of their own (bits, words, nats); all others lie between 0 and 1."""


@dataclass(frozen=True)
class Scores(Shown):
    """The result of `evaluate`.

    Args:
        model: the model's name.
        records: ids of the facts, in their order.
        samples: the raw responses.
        values: metric -> record -> value; a record is absent where the metric has nothing to say about it.
        protocol: what each metric means and how it was measured, one sentence each.
        seed: of the sampled texts and of the bootstrap.
        compared: whether locality was measured against another run; such scores cannot be a `before`.
        heldout: losses on held-out text, behind perplexity_heldout; None where it was not asked for.
        edited: the records whose target the edit was asked for, which alone have success, paraphrase and portability;
            None where all are, or nobody said.
    """

    model: str
    records: tuple[str, ...]
    samples: tuple[Sample, ...]
    values: Mapping[str, Mapping[str, float]]
    protocol: Mapping[str, str]
    seed: int = 0
    compared: bool = False
    heldout: Heldout | None = None
    edited: tuple[str, ...] | None = None

    kind = KIND
    heading = "Scores"

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The model and the protocol."""
        return {"model": self.model, "protocol": self.protocol, "seed": self.seed}

    @cached_property
    def metrics(self) -> dict[str, Interval]:
        """Mean over records, 95% bootstrap interval over records (`.ci95`), number of records (`.n`).

        After the means come the harmonic Scores, functions of three of them, and perplexity, whose n counts documents.
        """
        intervals = self._means() | composites(self.values, self.records, self.seed)
        if self.heldout is not None:
            intervals[PERPLEXITY] = self.heldout.perplexity(self.seed)
        return intervals

    def _means(self) -> dict[str, Interval]:
        if not self.values:
            return {}
        grid = bootstrap_mean_grid(columns(self.values, list(self.values), self.records), seed=self.seed)
        return {name: grid.cell(i) for i, name in enumerate(self.values)}

    @takes()
    def of_edited(self, facts: Sequence[Fact], requests: Sequence[Fact]) -> Scores:
        """The scores of a model with an edit in it: success, paraphrase and portability of the records it holds alone.

        Args:
            facts: the records' own, in their order.
            requests: the edit's; it holds a record where one has the record's subject and target.
        """
        asked, known = {_request(request) for request in requests}, {*self.records}
        facts = [fact for fact in facts if fact.id in known]  # a copy of another fact has no scores
        edited = tuple(fact.id for fact in facts if _request(fact) in asked)
        if len(edited) == len(facts):
            return self
        held = set(edited)
        values = {
            name: {r: v for r, v in by_record.items() if r in held or METRICS[base_of(name)[0]].role not in OF_TARGET}
            for name, by_record in self.values.items()
        }
        return replace(self, values={name: by_record for name, by_record in values.items() if by_record}, edited=edited)

    @property
    def about_records(self) -> str:
        """`8 records`, or, of an edit that does not hold all of them, `3 of 8 records edited`."""
        edited, n = self.edited, len(self.records)
        return count(n, "record") if edited is None else f"{len(edited)} of {count(n, 'record')} edited"

    @takes()
    def compare(self, other: Scores, seed: int | None = None) -> dict[str, Interval]:
        """This model less the other on the same records, metric by metric: paired bootstrap differences.

        Args:
            other: scores of the same facts, under another edit or none.
            seed: of the bootstrap; None is that of these scores.

        Raises:
            BadFact: the two are of different records or questions.
        """
        return differences(self, other, self.seed if seed is None else seed)

    @classmethod
    @takes()
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """Scores (`parts`) of different records, measured alike, as one: each record under its own edit.

        Perplexity is left out: it belongs to a model, and here every record has its own.
        """
        values: dict[str, dict[str, float]] = {}
        for part in parts:
            for name, by_record in part.values.items():
                values.setdefault(name, {}).update(by_record)
        records = tuple(record for part in parts for record in part.records)
        samples = tuple(sample for part in parts for sample in part.samples)
        protocol = {name: says for part in parts for name, says in part.protocol.items()}
        protocol.pop(PERPLEXITY, None)
        return replace(parts[0], records=records, samples=samples, values=values, protocol=protocol, heldout=None)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per record and metric."""
        import pandas as pd

        rows = [(r, name, v[r]) for name, v in self.values.items() for r in self.records if r in v]
        return pd.DataFrame(rows, columns=["record", "metric", "value"])

    def samples_dataframe(self) -> pd.DataFrame:
        """The raw responses, one row per sample; the columns are the fields of `Sample`."""
        import pandas as pd

        names = [f.name for f in fields(Sample)]
        return pd.DataFrame([[getattr(s, name) for name in names] for s in self.samples], columns=names)

    samples_to_dataframe = samples_dataframe

    @takes()
    def figure(self, before: Scores) -> go.Figure:
        """Every score between 0 and 1 before and after, with its 95% interval.

        Args:
            before: the unedited model's scores on the same facts.

        Raises:
            BadFact: the two have no such score in common.
        """
        from ..figures import Change, before_after

        pairs = ((name, before.metrics.get(name), metric) for name, metric in self.metrics.items())
        changes = [Change(n, old, new) for n, old, new in pairs if old is not None and n not in NO_SHARES]
        if not changes:
            raise BadFact("no score is in both; score both models under the same protocols")
        return before_after(
            changes, title=f"{without_folders(self.model)}: before and after", subtitle=self.about_records
        )

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: `metrics.<name>` = {mean, ci95, n} and the protocol, without the raw samples."""
        metrics = {name: metric.as_dict() for name, metric in self.metrics.items()}
        edited = {} if self.edited is None else {"n_edited": len(self.edited)}
        return {
            "model": self.model,
            "n_records": len(self.records),
            "metrics": metrics,
            "protocol": self.protocol,
        } | edited

    def tables(self) -> Sequence[Table]:
        """Each metric with its interval and n; then what each means."""
        return [scores_table({"mean [95%]": self}), self.protocol_table()]

    def protocol_table(self) -> Table:
        """Each metric, and what it is."""
        return Table(["name", "what it is"], list(self.protocol.items()), "", "How it was measured.", only="page")

    def save(self, path: str | Path) -> Path:
        """Write the scores to `path`, one JSON file, whole or not at all."""
        content = {
            **self.as_dict(),
            "kind": KIND,
            "seed": self.seed,
            "compared": self.compared,
            "records": self.records,
            "values": self.values,
            "samples": [sample.as_dict() for sample in self.samples],
            "heldout": self.heldout.as_dict() if self.heldout is not None else None,
        } | ({} if self.edited is None else {"edited": self.edited})
        return write_json(path, content)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read the scores that `save` wrote to `path`.

        Raises:
            BadFile: it is not there, or not the scores of a version that this one reads.
        """
        from .metrics import in_order

        data = read_json(path)
        if data.get("kind") != KIND or data.get("schema_version") != 1:
            raise BadFile(f"{path}: no scores of schema version 1; give a file written by Scores.save or `kt eval`")
        with complete_file(path, "set of scores", "score again"):
            return cls(
                model=data["model"],
                records=tuple(data["records"]),
                samples=tuple(map(Sample.from_dict, data["samples"])),
                values={name: data["values"][name] for name in in_order(data["values"])},
                protocol=data["protocol"],
                seed=data["seed"],
                compared=data["compared"],
                heldout=Heldout.from_dict(data["heldout"]) if data.get("heldout") else None,
                edited=None if data.get("edited") is None else tuple(data["edited"]),
            )

    def __repr__(self) -> str:
        return f"Scores({without_folders(self.model)}: {self.about_records}, {len(self.metrics)} metrics)"


def _request(fact: Fact) -> tuple[str, str]:
    return normalised(fact.subject), normalised(fact.target or fact.foil or "")


def scores_table(scores: Mapping[str, Scores | None], after: str | None = None, note: str = "") -> Table:
    """Metrics down, models across: means with intervals.

    Args:
        scores: by the heading of their column; None leaves the column out.
        after: the column whose metrics and n the table has; the only one where None.
        note: the caption.
    """
    shown = {name: each for name, each in scores.items() if each is not None}
    main = shown[after or next(iter(shown))]
    from .metrics import base_of

    keyed = Counter(base_of(name)[0] for name in main.metrics if name.endswith("]"))
    rows = [
        [name, *(s.metrics.get(name) for s in shown.values()), m.n]
        for name, m in main.metrics.items()
        # Where all prompts are filed under one key, its rows would repeat those of the metric.
        if not (base_of(name)[1] and keyed[base := base_of(name)[0]] == 1 and main.values[name] == main.values[base])
    ]
    return Table(["metric", *shown, "n"], rows, f"{without_folders(main.model)}: {main.about_records}", note)


@dataclass(frozen=True)
class Comparison(Shown):
    """An edited model's scores beside the unedited model's and, of a joint edit, those of its control.

    `before_otherwise` and `after_otherwise` are of the same questions, asked in the other way: without the model's chat
    template where the first are in it, and the reverse.
    """

    before: Scores
    after: Scores
    control: Scores | None = None
    before_otherwise: Scores | None = None
    after_otherwise: Scores | None = None

    kind = "comparison"
    heading = "Before and after"

    @classmethod
    def load(cls, path: str | Path) -> Scores | Comparison:
        """Scores; a comparison if `before.json` or `control.json` lies in the same run folder."""
        names = ("before", "control", "before_otherwise", "after_otherwise")
        after, beside = Scores.load(path), [Path(path).with_name(FILES[name]) for name in names]
        before, *others = (Scores.load(each) if each.exists() else None for each in beside)
        return after if before is None else cls(before, after, *others)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The metadata of the edited model's scores."""
        return self.after.metadata

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: the edited model's metrics, the others' under their names, and the paired differences."""
        names = ("before", "control", "before_otherwise", "after_otherwise")
        beside = {name: scores for name in names if (scores := getattr(self, name)) is not None}
        less = {name: self.after.compare(scores) for name, scores in beside.items() if not name.endswith("otherwise")}
        gaps = {name: {m: gap.as_dict() for m, gap in by.items()} for name, by in less.items()}
        return self.after.as_dict() | {n: s.as_dict()["metrics"] for n, s in beside.items()} | {"differences": gaps}

    def tables(self) -> Sequence[Table]:
        """The models side by side; then what each metric means."""
        note = "MLP alone: the joint edit's MLP part by itself, x (1 - α)" if self.control is not None else ""
        columns = {"before": self.before, "after": self.after, "MLP alone": self.control}
        if self.after_otherwise is not None:
            other = "in the chat template" if self.after.protocol.get("chat") is None else "as they stand"
            columns |= {f"before, {other}": self.before_otherwise, f"after, {other}": self.after_otherwise}
            first = "as they stand" if self.after.protocol.get("chat") is None else "in the chat template"
            note = "; ".join(filter(None, (note, f"prompts are asked {first}, and in the last columns {other}")))
        return [scores_table(columns, "after", note), self.after.protocol_table()]

    def __repr__(self) -> str:
        return f"Comparison({self.after.model}: {self.after.about_records}, {len(self.after.metrics)} metrics)"
