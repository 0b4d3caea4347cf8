"""R-ROME (Gupta et al. 2024, arXiv 2403.07175): ROME with the mean key and the mean value in both places."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .. import closed_form as cf
from ..config import method
from .rome import ROME


@method("r-rome", "R-ROME: ROME with one key on both sides of the update", place=4)
@dataclass(frozen=True)
class RROME(ROME):
    """Section 3: the key k̄ of ROME's numerator also in its denominator."""

    @property
    def solver(self) -> cf.RankOne:
        return replace(super().solver, same_key=True)

    def write_mlp(self) -> cf.Write:
        return replace(super().write_mlp(), mean_value=True)
