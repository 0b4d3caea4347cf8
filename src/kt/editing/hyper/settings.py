"""How an editor is trained; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ...errors import KtError
from ..config import MOST, SQUARED, check_value, one_of, type_of


@dataclass(frozen=True)
class TrainingSettings:
    """How an editor is trained.

    Attributes:
        rank: of the networks' layers (the papers: 1,920 for GPT-J).
        layers: of each network; the papers' two.
        edits: records of a step, edited together, at most; None is the method's (MALMEN 128, of the paper's 512;
            MEND 32).
        min_edits: at least; the same as `edits` is the papers' fixed number.
        variety: share of the draws with another record's target, and share with a paraphrase as the prompt.
        lr: Adam's, of the networks, at the first step; it falls to zero in a line over `steps`.
        c_edit: weight of the paraphrases' loss (MEND's code: 0.1, for 100,000 steps).
        c_loc: weight of the unrelated prompts' KL divergence (the papers: 1).
        clip: the largest norm of a step's gradient; None is the paper's (MALMEN 1, MEND 100).
        steps: at most.
        check_every: steps between checks on held-out records.
        patience: checks without a smaller held-out loss before training stops.
        held_out: share of the subjects that are kept for the checks, which read as many of their records as the larger
            of `edits` and `rows`.
        test: share of the subjects that neither training nor any check sees.
        rows: prompts of one forward.
    """

    rank: int = 64
    layers: int = 2
    edits: int | None = None
    min_edits: int = 1
    variety: float = 0.5
    lr: float = 1e-3
    c_edit: float = 1.0
    c_loc: float = 2.0
    clip: float | None = None
    steps: int = 500
    check_every: int = 25
    patience: int = 8
    held_out: float = 0.1
    test: float = 0.1
    rows: int = 64

    def __post_init__(self) -> None:
        for spec in fields(self):
            whole = "int" in type_of(spec)
            bounds = (1, MOST) if whole else (0, SQUARED)
            check_value(spec.name, type_of(spec), getattr(self, spec.name), *bounds)
        if not 0 < self.held_out <= self.held_out + self.test < 1:
            given = f"held_out {self.held_out:g} and test {self.test:g}"
            raise KtError(f"{given} must be shares whose sum is below 1, the first above 0")
        if self.edits is not None and self.edits < self.min_edits:
            raise KtError(f"min_edits {self.min_edits} is more than edits {self.edits}; steps have one to the other")
        if not self.lr or self.clip == 0 or not self.c_edit + self.c_loc:
            name = "lr" if not self.lr else "clip" if self.clip == 0 else "c_edit and c_loc"
            raise KtError(f"{name} 0 trains nothing; give a number above zero")
        if self.variety > 1:
            raise KtError(f"variety {self.variety:g} must be a share between 0 and 1")

    @classmethod
    def given(cls, values: Mapping[str, Any]) -> TrainingSettings:
        """Of values by name; None is the default.

        Raises:
            KtError: an unknown setting, or a value that it cannot have.
        """
        for name in values:
            one_of(name, [spec.name for spec in fields(cls)], "training setting")
        return cls(**{name: value for name, value in values.items() if value is not None})

    @classmethod
    def of(cls, method: str, values: Mapping[str, Any]) -> TrainingSettings:
        """Of values by name, with the method's own for those that nobody gave."""
        from .editor import NETWORKS

        recipe = NETWORKS[method].recipe
        chosen = {name: value for name, value in values.items() if value is not None}
        return cls.given({"edits": recipe.edits, "clip": recipe.clip} | chosen)
