"""The report of a request: its target and old answer before and after an edit."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LEAST = math.log(sys.float_info.min)
"""Of a probability whose logarithm is below it a float holds fewer digits, and soon 0: it is that of a long answer."""
LOG_PROBS = "log_probs"
"""The field of a manifest with the natural logarithms of such probabilities, before and after."""


@dataclass(frozen=True)
class RequestReport:
    """One request's target and old answer, before and after: joint probability, and rank of the first token."""

    id: str
    prompt: str
    subject: str
    target: str
    answer: str | None
    target_prob: tuple[float, float]
    target_rank: tuple[int, int]
    answer_prob: tuple[float, float] | None
    answer_rank: tuple[int, int] | None
    control_prob: float | None = None
    """The target's probability under the edit's control (a joint edit's MLP part alone)."""

    def as_told(self, log_probs: LogProbs) -> tuple[Any, Any]:
        """Probabilities of target and old answer for a table: numbers, or texts where a float has no room for them."""
        pairs = {"target": self.target_prob, "answer": self.answer_prob}
        texts = [tuple(map(told_prob, log_probs[name])) if name in log_probs else pair for name, pair in pairs.items()]
        return texts[0], texts[1]

    def __repr__(self) -> str:
        prob, rank = (" -> ".join(f"{value:.3g}" for value in pair) for pair in (self.target_prob, self.target_rank))
        return f"RequestReport({self.prompt!r} {self.target!r}: probability {prob}, rank {rank})"


LogProbs = Mapping[str, tuple[float, float]]
"""Natural logarithms of the probabilities of `target` and `answer`, before and after."""


def with_log_probs(
    manifest: Mapping[str, Any], report: Sequence[RequestReport]
) -> list[tuple[RequestReport, LogProbs]]:
    """Each request with the logarithms of those of its probabilities for which a float has no room (`LEAST`)."""
    known = manifest.get(LOG_PROBS) or []
    if len(known) != len(report):
        return [(request, {}) for request in report]
    rows = [{name: (pair[0], pair[1]) for name, pair in row.items()} for row in known]
    return list(zip(report, rows, strict=True))


def told(prob: float | None, log_prob: float | None) -> float | str | None:
    """A probability for a table: the number, or a text where a float has no room for it."""
    faint = log_prob is not None and -math.inf < log_prob < LEAST
    return told_prob(log_prob) if faint and log_prob is not None else prob


def told_prob(log_prob: float) -> str:
    """A probability by its natural logarithm, as far as a float can hold it or not: `3.2e-412`."""
    power = math.floor(log_prob / math.log(10))
    head = f"{10 ** (log_prob / math.log(10) - power):.1f}"
    return f"1.0e{power + 1}" if head == "10.0" else f"{head}e{power}"
