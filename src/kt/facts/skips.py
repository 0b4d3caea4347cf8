"""What was left out of a file and why, counted while the file is read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from .fact import Fact


@dataclass
class Skips:
    """Counts that grow as a file is read: records, how many of each format, and those left out by reason.

    `first` holds the place of the first record of each reason. One reason that would name a record's own text would
    make as many entries as records; readers give reasons from a fixed set.
    """

    records: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        self.reasons[reason] += 1
        self.first.setdefault(reason, where)

    @property
    def total(self) -> int:
        """Records left out."""
        return self.reasons.total()

    def __str__(self) -> str:
        """One line for a screen, as in "12 of 1,000 records skipped: 12 empty alt (first: a.json, record 3)"."""
        why = ", ".join(f"{n:,} {reason} (first: {self.first[reason]})" for reason, n in self.reasons.most_common())
        return f"{self.total:,} of {self.records:,} records skipped" + (f": {why}" if why else "")

    def to_dict(self) -> dict[str, object]:
        """For results.json."""
        reasons = [{"reason": r, "n": n, "first": self.first[r]} for r, n in self.reasons.most_common()]
        return {"records": self.records, "formats": dict(self.formats), "skipped": self.total, "reasons": reasons}


@dataclass(frozen=True)
class Loaded:
    """The facts of a source, with what was left out of it."""

    facts: list[Fact]
    skips: Skips
