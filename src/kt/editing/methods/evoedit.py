"""EvoEdit (arXiv 2510.13851): AlphaEdit whose projector loses the directions of each edit's keys."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .. import closed_form as cf
from ..config import method
from .alphaedit import AlphaEdit


@method("evoedit", "EvoEdit: AlphaEdit whose projector loses the directions of each edit's keys", place=7)
@dataclass(frozen=True)
class EvoEdit(AlphaEdit):
    """See closed_form.sequential.Evolving. A session's first edit is AlphaEdit's."""

    revision = 1  # requests whose keys are held, and the least L2

    def plan(self) -> cf.LocateThenEdit:
        whole = super().plan()
        solver = cf.Evolving(self.nullspace_threshold, self.L2)
        return replace(whole, paths=(replace(whole.paths[0], solver=solver),))
