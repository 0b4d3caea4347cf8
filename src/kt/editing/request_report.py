"""The report of a request: its target and old answer before and after an edit."""

from __future__ import annotations

from dataclasses import dataclass


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

    def __repr__(self) -> str:
        prob, rank = (" -> ".join(f"{value:.3g}" for value in pair) for pair in (self.target_prob, self.target_rank))
        return f"RequestReport({self.prompt!r} {self.target!r}: probability {prob}, rank {rank})"
