"""MEND (Mitchell et al. 2022, arXiv 2110.11309): the rank-one gradient of every token through a trained network."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import method
from .malmen import MALMEN


@method("mend", "MEND: a trained network's rank-one updates, summed over tokens and edits", place=17)
@dataclass(frozen=True)
class MEND(MALMEN):
    """See kt.editing.hyper.mend for the formulas."""

    depth = (25, 27, 27)  # of a new editor: the authors' last three blocks, GPT-J
