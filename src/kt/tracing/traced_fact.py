"""`TracedFact`: what was measured of one fact, and its effects.

A fact's effects are computed from means over its S noise draws (IntAttn-Edit, section 4.1):

prob        mean_S p_patched(r) - mean_S p_corrupted(r)
logit_diff  (mean_S d_patched - mean_S d_corrupted) / (d_clean - mean_S d_corrupted), d = logit(r) - logit(r'); eq. 8

r and r' are the first tokens of answer and foil. The same two of all their tokens, with log p(answer) the sum of each
token's log-probability given those before it (natural logarithm; the answer is read behind the prompt in every run):

log_prob       mean_S log p_patched(answer) - mean_S log p_corrupted(answer)
log_prob_diff  as logit_diff with d = log p(answer) - log p(foil), which for one token each is logit(r) - logit(r')

These are the effects of denoising: a clean state in the corrupted run and how much it restores (which states suffice).
In the noising direction a corrupted state stands in the clean run, and the effect is how much it takes away (which
states are needed): p_clean - mean_S p_patched, and (d_clean - mean_S d_patched) over the same denominator. Both are 0
where the patch does nothing and 1 where the logit difference goes all the way (Zhang & Nanda 2023, arXiv 2309.16042;
Heimersheim & Nanda 2024).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from .._util.text import visible, words
from ..errors import BadFact, WorkFailed
from ..model.tokens import Span

METRICS = ("prob", "logit_diff")
"""Of the first token of answer and foil; always measured."""
WHOLE = ("log_prob", "log_prob_diff")
"""Of the whole answer and foil."""
EVERY = METRICS + WHOLE


def metric_name(metric: str) -> str:
    """The metric, written with a hyphen (as in the command line) or with an underscore.

    Raises:
        BadFact: there is no such metric.
    """
    if (name := str(metric).replace("-", "_")) not in EVERY:
        raise BadFact(f"metric {metric!r} is unknown; choose among {', '.join(EVERY)}")
    return name


def metric_names(metrics: str | Sequence[str]) -> tuple[str, ...]:
    """One metric or several, each once."""
    return tuple(dict.fromkeys(map(metric_name, words(metrics))))


@dataclass(frozen=True, eq=False)
class TracedFact:
    """One fact's measurements. `index` is its place in the caller's list.

    `clean`, `corrupted` and `patched` are keyed by `prob`, p(answer) of its first token, and `logit_diff`,
    logit(r) - logit(r'); where whole answers were scored also by `log_prob`, log p(answer), and `log_prob_diff`,
    log p(answer) - log p(foil).
    `answer_ids` and `foil_ids` are empty in files from before whole answers. The last `at` of `ids` are the answer's.
    """

    index: int
    id: str
    relation: str
    prompt: str
    subject: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    span: Span
    roles: tuple[str, ...]
    answer: str
    answer_id: int
    answer_source: str
    foil: str
    foil_id: int
    foil_source: str
    known: bool
    swapped_for: str | None
    clean: Mapping[str, float]
    corrupted: Mapping[str, Float[ndarray, " sample"]]
    patched: Mapping[str, Mapping[str, Float[ndarray, "layer token sample"]]]
    direction: str = "denoise"
    answer_ids: tuple[int, ...] = ()
    foil_ids: tuple[int, ...] = ()
    at: int = 0

    def __repr__(self) -> str:
        kinds = ", ".join(self.patched)
        p = f"p {self.p_clean:.3f}, {self.p_corrupt:.3f} corrupted"
        return f"TracedFact({self.prompt!r} {self.answer!r} not {self.foil!r}: {p}; {kinds})"

    def _repr_html_(self) -> str:
        """A row: the question, what corruption does, and each kind's strongest cell."""
        from ..report import Table

        row = {"prompt": visible(self.prompt), "answer": visible(self.answer), "foil": visible(self.foil)}
        seen: dict[str, Any] = {**row, "p(answer), clean": self.p_clean, "corrupted": self.p_corrupt}
        for kind, values in self.patched.items():
            if ".h" in kind or not np.isfinite(values["prob"]).any():  # single heads would be a hundred columns
                continue
            effect = self.effect(kind, "prob")
            layer, token = np.unravel_index(int(np.nanargmax(effect)), effect.shape)
            where = f"layer {layer}, {visible(self.tokens[token].strip())!r}"
            seen[f"largest effect on p, {kind}"] = f"{effect[layer, token]:.3f} at {where}"
        return Table(list(seen), [list(seen.values())])._repr_html_()

    @property
    def question(self) -> tuple[str, str, int, int]:
        """The traced question; two traces hold the same fact where these are equal."""
        return self.prompt, self.subject, self.answer_id, self.foil_id

    @property
    def p_clean(self) -> float:
        """p(answer), of its first token, in the clean run."""
        return self.clean["prob"]

    @property
    def p_corrupt(self) -> float:
        """Mean p(answer) over the corrupted runs."""
        return float(self.corrupted["prob"].mean(dtype=np.float64))

    @property
    def ld_clean(self) -> float:
        """Logit difference in the clean run."""
        return self.clean["logit_diff"]

    @property
    def ld_corrupt(self) -> float:
        """Mean logit difference over the corrupted runs."""
        return float(self.corrupted["logit_diff"].mean(dtype=np.float64))

    def gap(self, metric: str) -> float:
        """Clean minus mean corrupted value of a metric: eq. 8's denominator."""
        return self.clean[metric] - float(self.corrupted[metric].mean(dtype=np.float64))

    def effects(self, kind: str, metric: str) -> Float[ndarray, "layer token sample"]:
        """The effect of each draw; eq. 8's denominator is the mean over draws for all of them."""
        metric = metric_name(metric)
        patched = self.patched[str(kind)][metric].astype(np.float64)
        gained = patched - self.corrupted[metric].astype(np.float64)
        if self.direction == "noise":
            gained = self.clean[metric] - patched
        if metric in ("prob", "log_prob"):
            return gained
        gap = self.gap(metric)
        if gap == 0:
            raise WorkFailed(
                f"{self.prompt!r}: clean and corrupted {metric.replace('_', ' ')} are equal, so eq. 8 has no value; "
                "use the prob metric or a stronger corruption"
            )
        return gained / gap

    def effect(self, kind: str, metric: str) -> Float[ndarray, "layer token"]:
        """P(r) or LD(r, r') of section 4.1: the mean over draws."""
        return self.effects(kind, metric).mean(-1)


def fact_header(fact: TracedFact) -> dict[str, Any]:
    plain = {f.name: getattr(fact, f.name) for f in fields(fact) if f.name not in ("corrupted", "patched")}
    if not set(WHOLE) & set(fact.clean):  # of first tokens alone, as every file before whole answers were scored
        plain = {name: value for name, value in plain.items() if name not in ("answer_ids", "foil_ids")}
    if not fact.at:
        plain.pop("at")
    return plain | {"clean": dict(fact.clean), "span": list(fact.span)}


def fact_from(fact: dict[str, Any], i: int, kinds: Sequence[str], arrays: dict[str, ndarray]) -> TracedFact:
    other: dict[str, Any] = {name: tuple(fact[name]) for name in ("ids", "tokens", "roles")}
    other |= {name: tuple(fact.get(name, ())) for name in ("answer_ids", "foil_ids")}
    metrics = [m for m in EVERY if m in fact["clean"]]
    other["span"] = Span(*fact["span"])
    other["corrupted"] = {m: arrays[f"{i}.corrupted.{m}"] for m in metrics}
    other["patched"] = {k: {m: arrays[f"{i}.{k}.{m}"] for m in metrics} for k in kinds}
    return TracedFact(**fact | other)


def finite(fact: TracedFact, values: ndarray) -> ndarray:
    """Return the values; NaN means not measured.

    Raises:
        WorkFailed: a value is infinite.
    """
    if np.isinf(values).any():
        raise WorkFailed(f"{fact.prompt!r} has effects that are infinite; trace it again")
    return values
