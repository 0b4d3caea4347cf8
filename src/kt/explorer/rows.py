"""The table of facts: one row a fact of all the runs, joined by its prompt; failures first.

Traces, probes, edits and scores each have their own record of a fact. What they share is the prompt, so this is the
key; scores, which have ids and samples, are joined through the prompt of their samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .._util.text import count, visible
from ..editing import Edit
from ..editing.request_report import told, with_log_probs
from ..evaluation.samples import Sample
from ..evaluation.scores import Comparison, Scores
from ..probing import Probe
from ..residual import Residual
from ..tracing import Trace
from .numbers import short
from .seen import Seen

COLUMNS = {
    "edit_success_tf_exact": ("tf", "The new answer, every token the argmax, teacher-forced after the prompt"),
    "edit_success_gen_exact": ("gen", "The new answer as greedy text after the prompt"),
    "efficacy_prob_success": ("prob", "The new answer more probable than the old one after the prompt"),
    "edit_success_wild_contains": ("wild", "The new answer in the free answer to the prompt"),
    "paraphrase_tf_exact": ("rephrased", "The new answer after rephrased prompts, teacher-forced"),
    "paraphrase_gen_exact": ("rephrased, gen", "The new answer as greedy text after rephrased prompts"),
    "neighbourhood_same_argmax": ("locality", "Neighbours whose next token is as before the edit"),
    "neighbourhood_tf_exact": ("neighbours, tf", "Neighbours' own answers, teacher-forced"),
    "specificity_prob_success": ("neighbours, prob", "Neighbours' own answer more probable than the new one"),
    "portability_tf_exact": ("portability", "What follows from the new answer, teacher-forced"),
}
"""Metric -> heading and meaning of its column, where a run has it; higher is better."""
FIRST = 4
"""So many of them say whether the edit took."""
STATES = ("failed", "side effects", "holds", "not edited")


@dataclass
class Row:
    """What the runs know of one fact. `scores` is (before, after) by metric; so are the answers' probabilities, as text
    where a float has no room for them."""

    id: str
    prompt: str
    subject: str
    old: str | None = None
    new: str | None = None
    relation: str = ""
    was: list[str] = field(default_factory=list)
    rank: tuple[int, int] | None = None
    prob: tuple[float | str | None, ...] | None = None
    old_prob: tuple[float | str | None, ...] | None = None
    scores: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    lead: tuple[float, float] | None = None
    texts: list[dict[str, Any]] = field(default_factory=list)
    near: list[dict[str, Any]] = field(default_factory=list)

    def fill(self, what: str, **known: Any) -> Row:
        """Take over what another record knows of the fact, where this one knows nothing."""
        if what not in self.was:
            self.was.append(what)
        for name, value in known.items():
            if value and not getattr(self, name):
                setattr(self, name, value)
        return self

    @property
    def residual(self) -> float | None:
        """The share of the old answer's lead that the edit left; None where it had none."""
        return self.lead[1] / self.lead[0] if self.lead is not None and self.lead[0] > 0 else None

    @property
    def problems(self) -> list[str]:
        """In words, what failed."""
        found = []
        if self.rank is not None and self.rank[1] > 0:
            found.append(f"the new answer's first token has rank {self.rank[1]:,}")
        for number, (metric, (heading, _)) in enumerate(COLUMNS.items()):
            value = self.scores.get(metric, (None, None))[1]
            if value is not None and value < 1 and (number < FIRST or heading.startswith(("rephrased", "locality"))):
                found.append(f"{heading} {value:.0%}")
        return found

    @property
    def took(self) -> list[float]:
        """Success after the edit, by protocol."""
        found = [self.scores[metric][1] for metric in list(COLUMNS)[:FIRST] if metric in self.scores]
        return [value for value in found if value is not None]

    @property
    def state(self) -> str:
        """One of `STATES`: an edit failed, holds with side effects (paraphrases, neighbours), or holds."""
        if "edited" not in self.was and not self.scores:
            return STATES[3]
        took = self.took
        if (self.rank is not None and self.rank[1] > 0) or any(value < 1 for value in took):
            return STATES[0]
        if not took and self.rank is None:
            return STATES[3]
        return STATES[1] if self.problems else STATES[2]

    def as_dict(self) -> dict[str, Any]:
        """For the page; texts made visible, numbers short."""
        values = {name: getattr(self, name) for name in ("id", "prompt", "subject", "old", "new", "relation")}
        return {
            **{name: None if value is None else visible(value) for name, value in values.items()},
            "was": self.was,
            "state": STATES.index(self.state),
            "problems": self.problems,
            "rank": self.rank,
            "prob": short(self.prob),
            "oldProb": short(self.old_prob),
            "scores": {name: short(pair) for name, pair in self.scores.items() if name in COLUMNS},
            "residual": short(self.residual),
            "lead": short(self.lead),
            "texts": self.texts,
            "near": self.near,
        }


class Rows:
    """The rows by prompt, in the order in which the runs name them."""

    def __init__(self, results: Sequence[Any], seen: Sequence[Seen] = ()) -> None:
        self.by_prompt: dict[str, Row] = {}
        of = lambda kind: [result for result in results if isinstance(result, kind)]  # noqa: E731
        for edit in of(Edit):
            self._edit(edit)
        for scores in of((Scores, Comparison)):
            self._scores(scores)
        for residual in of(Residual):
            self._residual(residual)
        for trace in of(Trace):
            for fact in trace.facts:
                self.row(fact, "traced").fill("traced", old=fact.answer, new=fact.foil, relation=fact.relation)
        for probe in of(Probe):
            for probed in probe.facts:
                row = self.row(probed, "probed")
                row.fill("probed", old=probed.original, new=probed.target, relation=probed.relation)
        for prompt in dict.fromkeys(each.prompt for each in seen if each.prompt in self.by_prompt):
            texts = {each.state: visible(each.text.strip()) for each in seen if each.prompt == prompt}
            row, (before, after) = self.by_prompt[prompt], map(texts.get, ("before", "after"))
            rewritten = None if before is None or after is None else before != after
            text = {"role": "edit", "prompt": visible(prompt), "answer": row.new, "before": before, "after": after}
            row.texts.insert(0, text | {"changed": None, "rewritten": rewritten})
        self.rows = sorted(self.by_prompt.values(), key=_urgency)
        self.place = {row.prompt: i for i, row in enumerate(self.rows)}

    def row(self, fact: Any, what: str) -> Row:
        """The row of a fact, new where there is none."""
        row = self.by_prompt.setdefault(fact.prompt.rstrip(), Row(fact.id, fact.prompt.rstrip(), fact.subject))
        return row.fill(what)

    def index(self, fact: Any) -> int:
        """The place of a fact's row."""
        return self.place[fact.prompt.rstrip()]

    def _edit(self, edit: Edit) -> None:
        for request, logs in with_log_probs(edit.manifest, edit.report):
            row = self.row(request, "edited").fill("edited", old=request.answer, new=request.target)
            if row.rank is None:  # of several edits the first, as in the head of the page
                row.rank, row.prob = request.target_rank, _told(request.target_prob, logs.get("target"))
                row.old_prob = _told(request.answer_prob, logs.get("answer"))

    def _scores(self, scores: Scores | Comparison) -> None:
        before, after = (scores.before, scores.after) if isinstance(scores, Comparison) else (None, scores)
        earlier = {(s.record, *s.key): s for s in (before.samples if before else ())}
        by_record: dict[str, list[Sample]] = {}
        for sample in after.samples:
            by_record.setdefault(sample.record, []).append(sample)
        prompts = {row.id: row for row in self.by_prompt.values()}
        for record, samples in by_record.items():
            asked = next((s for s in samples if s.role in ("edit", "answer")), samples[0])
            row = self.by_prompt.get(asked.prompt.rstrip()) or prompts.get(record)
            if row is None:
                row = self.by_prompt.setdefault(asked.prompt.rstrip(), Row(record, asked.prompt.rstrip(), ""))
            new, old = (asked.answer, asked.rival) if asked.role == "edit" else (None, asked.answer)
            row.fill("scored", old=old, new=new)
            for metric, values in after.values.items():
                if metric in COLUMNS and record in values and before is not None:
                    row.scores.setdefault(metric, (before.values.get(metric, {}).get(record), values[record]))
            known = {(text["role"], text["prompt"]) for text in (*row.texts, *row.near)}
            for sample in samples:
                found = _text(sample, earlier.get((record, *sample.key)), before is not None)
                if found is not None and (found["role"], found["prompt"]) not in known:
                    (row.near if sample.role == "neighbourhood" else row.texts).append(found)

    def _residual(self, residual: Residual) -> None:
        scored = iter(zip(residual.leads["before"], residual.leads["after"], strict=True))
        for fact, counts in zip(residual.facts, residual.scored, strict=True):
            row = self.row(fact, "probed").fill("probed", old=fact.original, new=fact.target, relation=fact.relation)
            if counts:
                before, after = map(float, next(scored))
                row.lead = row.lead or (before, after)


def _told(probs: tuple[float, float] | None, logs: tuple[float, float] | None) -> tuple[float | str | None, ...] | None:
    """Probabilities before and after, by their logarithms where those are known."""
    return probs if probs is None or logs is None else tuple(map(told, probs, logs))


def _urgency(row: Row) -> tuple[int, float, float]:
    """Failures first; among equals the less successful, then those with more neighbours changed."""
    mean = float(np.mean(row.took)) if row.took else 1.0
    near = row.scores.get("neighbourhood_same_argmax", (None, None))[1]
    return STATES.index(row.state), mean, 1.0 if near is None else near


def _text(sample: Sample, earlier: Sample | None, compared: bool) -> dict[str, Any] | None:
    """A prompt with the model's text before and after; None where no text was written and nothing compares."""
    now, was = (None if s is None else s.text or s.wild_text or s.exact_text for s in (sample, earlier))
    changed = None
    if sample.role == "neighbourhood" and earlier is not None and sample.predicted_ids and earlier.predicted_ids:
        changed = sample.predicted_ids[0] != earlier.predicted_ids[0]
    if sample.role == "answer" or (now is None and changed is None):
        return None
    texts = {"before": was, "after": now} if compared else {"before": now, "after": None}
    seen = {name: None if text is None else visible(text.strip()) for name, text in texts.items()}
    answer = None if sample.answer is None else visible(sample.answer.strip())
    rewritten = None if was is None or now is None else was != now
    return {"role": sample.role, "prompt": visible(sample.prompt), "answer": answer, **seen} | {
        "changed": changed,
        "rewritten": rewritten,
    }


def columns(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The columns of the table that some row fills: of metrics with one base the first ones that are there."""
    there = {metric for row in rows for metric, pair in row.scores.items() if pair[1] is not None}
    found = list(_wanted(there))
    if not any(each["key"] in list(COLUMNS)[:FIRST] for each in found) and any(row.rank for row in rows):
        found.insert(0, {"key": "rank", "name": "rank", "help": "Rank of the new answer's first token after the edit"})
    if any(row.residual is not None for row in rows):
        says = "Share of the old answer's lead over other answers that the edit left: 0 none, 1 all; of all facts, "
        says += "the share of their leads together; – where the old answer had none"
        found.append({"key": "residual", "name": "residual", "help": says})
    return found


def _wanted(there: set[str]) -> Iterator[dict[str, str]]:
    bases: set[str] = set()
    for number, (metric, (name, says)) in enumerate(COLUMNS.items()):
        base = metric.partition("_")[0]
        if metric in there and (number < FIRST or base not in bases):
            bases.add(base)
            yield {"key": metric, "name": name, "help": says}


def summary(rows: Sequence[Row]) -> str:
    """`10 facts: 1 failed, 2 with side effects`; of facts that were only traced or probed, how many were edited."""
    states = [row.state for row in rows]
    edited = [state for state in states if state != STATES[3]]
    parts = [f"{edited.count(STATES[0])} failed", f"{edited.count(STATES[1])} with side effects"]
    some = f", {len(edited)} of them edited" if 0 < len(edited) < len(rows) else ""
    return count(len(rows), "fact") + some + (f": {', '.join(parts)}" if edited else "")
