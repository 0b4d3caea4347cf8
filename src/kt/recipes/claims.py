"""Claims of a paper's text about its figure as checks: a number of ours, and the range in which the text holds.

    [[claims]]
    says = "Attention peaks within the first five layers"
    section = "4.1"
    check = "peak"                        # one of the kind's checks; the other keys are the check's own
    kind = "attn"
    layers = [1, 5]                       # counted from 1

A check gives one number with a 95% bootstrap interval over facts. The text holds where the number lies in the range
that the check states; `sure` where the whole interval lies on the same side. Where a text is vague ("middle layers",
"quickly"), the range is ours, and it is printed beside the text. Checks of one trace are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from ..errors import BadFile
from ..report import Table
from ..stats import Interval
from .base import Keys
from .result import MISSING
from .values import flag, number, refuse, span, text, texts, whole

ABOUT = ("says", "section", "check")
PARTS = ("low", "middle", "high")
LISTS = ("roles", "metrics")
"""Keys of a check that hold lists of texts."""
NOTHING = Interval(math.nan, math.nan, math.nan, 0)
COLUMNS = ("model", "the paper says", "section", "holds where", "ours [95%]", "n", "holds")


class Claim(NamedTuple):
    """A sentence of the paper, its section, and the check with its own keys."""

    says: str
    section: str
    check: str
    about: Mapping[str, Any]


class Finding(NamedTuple):
    """`value` should lie strictly between `low` and `high`; `rule` says so in words, `ours` shows the value.

    With `reason` there is no value: nothing to measure the claim by, or (`fails`) that itself is against it.
    """

    rule: str
    value: Interval
    low: float = -math.inf
    high: float = math.inf
    ours: str = ""
    reason: str = ""
    fails: bool = False


@dataclass(frozen=True)
class Verdict:
    """A claim held against one model; `holds` is None where it was not measured, or in a smoke run."""

    model: str
    claim: Claim
    finding: Finding
    smoke: bool

    @property
    def holds(self) -> bool | None:
        """Whether our number lies in the text's range."""
        finding = self.finding
        if (
            self.smoke
            or (finding.reason and not finding.fails)
            or (not finding.reason and math.isnan(finding.value.mean))
        ):
            return None
        return not finding.reason and finding.low < finding.value.mean < finding.high

    @property
    def sure(self) -> bool | None:
        """Whether the whole interval says the same; None without one, or where there was nothing to measure."""
        finding, ends = self.finding, self.finding.value.ci95
        if self.holds is None or ends is None or finding.reason:
            return None
        inside = [finding.low < end < finding.high for end in ends]
        return all(inside) if self.holds else not any(inside) and (ends[1] <= finding.low or ends[0] >= finding.high)

    def line(self) -> list[str]:
        """A line of the table."""
        from .._util.text import visible

        finding = self.finding
        ours = finding.reason or finding.ours or shown(finding.value)
        word = {True: "yes", False: "no", None: MISSING}[self.holds]
        word += " (interval reaches across)" if self.sure is False else ""
        cells = [self.model, self.claim.says, self.claim.section, finding.rule, ours, str(finding.value.n), word]
        return [visible(cell) for cell in cells]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        finding = self.finding
        about = {"model": self.model, **self.claim._asdict(), "rule": finding.rule, "reason": finding.reason or None}
        return about | {"ours": finding.value.as_dict(), "holds": self.holds, "sure": self.sure}


def read_claims(
    path: Path, content: Mapping[str, Any], checks: Mapping[str, Keys], values: Mapping[str, Sequence[str]]
) -> tuple[Claim, ...]:
    """[[claims]] of a kind whose checks have these keys, some with only these values; one claim a metric of `metrics`.

    Raises:
        BadFile: an unknown check, a stray or missing key, or a value that there is not.
    """
    claims = []
    for row in content.get("claims", ()):
        where = f"[[claims]] of {path}, {str(row.get('says', ''))[:40]!r}"
        Keys((*row, *ABOUT), ABOUT).check(where, row)
        says, section = (text(where, key, row[key]) for key in ("says", "section"))
        if not isinstance(row["check"], str) or row["check"] not in checks:
            raise BadFile(f"{where}: no check {row['check']!r}; there are {', '.join(checks)}")
        about = {key: value for key, value in row.items() if key not in ABOUT}
        checks[row["check"]].check(f"{where}, check {row['check']}", about)
        about = {key: _value(where, key, value, values) for key, value in about.items()}
        if "layers" in about and "part" in about:
            raise BadFile(f"{where}: layers and part both say where; leave one of them out")
        if "either_count" in about and "layers" not in about:
            raise BadFile(f"{where}: either_count is about layers, which are not there; leave it out")
        metrics = about.pop("metrics", None)
        for keys in [about] if metrics is None else [about | {"metric": metric} for metric in metrics]:
            claims.append(Claim(says, section, row["check"], keys))
    return tuple(claims)


def _value(where: str, key: str, value: Any, values: Mapping[str, Sequence[str]]) -> Any:
    """The value of a check's key, as the key's name says; a text where it says nothing."""
    if key in LISTS:
        return texts(where, key, value, values[key])
    return READERS[key](where, key, value) if key in READERS else text(where, key, value, values.get(key, ()))


def _from_the_end(where: str, key: str, value: Any) -> int:
    """A layer counted from the end, -1 the last."""
    if type(value) is not int or value > -1:
        refuse(where, key, value, "a layer counted from the end, -1 for the last")
    return value


def _above_zero(where: str, key: str, value: Any) -> float:
    """A distance that something can be less than."""
    if number(where, key, value, 0) == 0:
        refuse(where, key, value, "a number above 0")
    return float(value)


READERS: Mapping[str, Callable[[str, str, Any], Any]] = {
    "layers": lambda where, key, value: list(span(where, key, value)),
    "layer": _from_the_end,
    "after": partial(whole, least=1),
    "either_count": flag,
    "near": number,
    "by": _above_zero,
    "below": number,
    "above": number,
    "part": partial(text, known=PARTS),
}
"""How the values of a check's keys are read; those of other keys are texts."""


def beyond(about: Mapping[str, Any], n_layers: int) -> str:
    """Why a check cannot be made of a model of so many layers; empty where it can."""
    least = {"layers": lambda at: at[1], "after": lambda at: at + 1, "layer": lambda at: -at}
    wrong = [key for key, needed in least.items() if key in about and needed(about[key]) > n_layers]
    return f"{wrong[0]} = {about[wrong[0]]} is beyond a model of {n_layers} layers" if wrong else ""


class Layers(NamedTuple):
    """Layers [start, stop), counted from 0, and how the table names them."""

    start: int
    stop: int
    words: str


def layers_of(about: Mapping[str, Any], n_layers: int) -> Layers:
    """`layers` = [first, last] counted from 1 (`either_count`: or from 0, where the paper does not say), or `part` of
    the model: its low, middle or high third. All layers where neither is named."""
    if "layers" in about:
        first, last = (int(layer) for layer in about["layers"])
        if about.get("either_count"):
            return Layers(max(0, first - 1), min(n_layers, last + 1), f"layers {first} to {last}, from 0 or from 1")
        return Layers(first - 1, min(n_layers, last), f"layers {first} to {last}, counted from 1")
    if "part" in about:
        part = PARTS.index(about["part"])
        start, stop = (round(n_layers * third / 3) for third in (part, part + 1))
        return Layers(start, stop, f"the {about['part']} third of {n_layers} layers")
    return Layers(0, n_layers, "all layers")


def peak_layer(table: Float[ndarray, "fact layer"]) -> Interval:
    """The layer (from 0) where the mean over facts is highest, with its interval over resampled facts."""
    from ..stats import bootstrap_of_means

    return bootstrap_of_means(table, lambda means: means.argmax(1).astype(np.float64))


def shown(mean: Interval) -> str:
    """A mean and its interval to three digits: probabilities of a set's tokens can be of any size."""
    ends = "" if mean.ci95 is None else f" [{mean.low:.3g}, {mean.high:.3g}]"
    return MISSING if math.isnan(mean.mean) else f"{mean.mean:.3g}{ends}"


def peak_words(peak: Interval) -> str:
    """`layer 3, the 4th from 1 [2, 5]`: with both ways to count."""
    if math.isnan(peak.mean):
        return MISSING
    ends = "" if peak.ci95 is None else f" [{peak.low:.0f}, {peak.high:.0f}]"
    return f"layer {peak.mean:.0f}{ends} (from 1: {peak.mean + 1:.0f})"


def tables(verdicts: Sequence[Verdict], title: str, note: str) -> list[Table]:
    """The table of claims, where there are some."""
    return [Table(COLUMNS, [verdict.line() for verdict in verdicts], title, note)] if verdicts else []


def note(verdicts: Sequence[Verdict]) -> str:
    """How to read the table."""
    text = "layers are counted from 0 unless said; intervals are over facts"
    if any(verdict.smoke for verdict in verdicts):
        return f"{text}; a smoke run judges no claim"
    return f"{text}; where the text is vague the range is kt's"
