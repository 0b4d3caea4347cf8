"""What a session does about the norms of wanted values, which grow from edit to edit.

δ is bounded relative to the value that it is added to. Each edit makes the values of the next ones a little longer, and
so the bound, and so the weights. A norm guard rescales the wanted values of a search before anything is solved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import floor
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from ..._util.text import count
from ...errors import warn_user
from ...facts.fact import Fact
from ...model.sites import Kind, Site
from ...runs.journal import Journal
from .aims import TargetSite
from .contexts import Contexts
from .keys import fact_values
from .objective import Objective
from .post_norm import added
from .targets import Targets, find_targets

if TYPE_CHECKING:
    from ...model.model import TracedModel
    from ..plan import SolveContext

GUARDS = ("kt", "nas")
OLDER = {"own": "kt"}
"""Names that stand in older files and scripts."""
SAMPLE = 100
"""Facts that NAS's anchor is a mean over, at most; its code takes 1,000."""
FEW = 10
"""Fewer are warned of."""
LONGEST = 0.05
"""The share of a sample's values that is left out of its mean: the longest."""
TOO_LONG = 2.0
"""A request whose value is longer than so many anchors is left as it is."""

Modules = Mapping[TargetSite, Kind | str]
"""Of each target site in the residual stream, the linear map that is written for it."""


class NormGuard(Protocol):
    """Takes what a search found, and gives it with other wanted values; `notes` go into the manifest."""

    name: ClassVar[str]

    def __call__(
        self, context: SolveContext, facts: Sequence[Fact], found: Targets, objective: Objective, modules: Modules
    ) -> Targets: ...

    @property
    def notes(self) -> dict[str, Any]: ...

    def tell(self, requests: int) -> None:
        """Say, once the solve of so many requests is done, which of them it left as they were."""


@dataclass
class OwnNorm:
    """kt's own: every wanted value at the norm that its own site and prompt have in the unedited model."""

    name: ClassVar[str] = "kt"
    unedited: Callable[[], AbstractContextManager[Any]]

    def __call__(
        self, context: SolveContext, facts: Sequence[Fact], found: Targets, objective: Objective, modules: Modules
    ) -> Targets:
        wanted = {}
        with self.unedited():
            for aim, value in found.wanted.items():
                norm = fact_values(context.model, facts, Contexts(), aim.site, aim.position).norm(dim=0)
                wanted[aim] = value * (norm.to(value) / value.norm(dim=-1))[:, None]
        return found._replace(wanted=wanted)

    @property
    def notes(self) -> dict[str, Any]:
        return {}

    def tell(self, requests: int) -> None:
        """It leaves none."""


@dataclass
class NormAnchor:
    """NAS (Norm-Anchor Scaling, Liu et al. 2026, arXiv 2602.02543, and its code). With v0 what the module that is
    written adds to the stream h, and δ what was found,

        v* = v0 + δ,   wanted = (h - v0) + v* · anchor / ‖v*‖,   wanted = h where ‖v*‖ > 2 anchor

    The anchor is the mean of ‖v*‖ over a sample of facts, each searched for on the unedited model, without the longest
    twentieth. Where a method aims at a module's own output, v0 is h.

    Args:
        sample: the facts, with targets.
        journal: keeps their searches.
        anchors: by target site, as far as they are known; shared by the edits of a session.
    """

    name: ClassVar[str] = "nas"
    unedited: Callable[[], AbstractContextManager[Any]]
    sample: Sequence[Fact]
    journal: Journal
    anchors: dict[str, float]
    skipped: list[str] = field(default_factory=list)
    _far: set[tuple[str, str]] = field(default_factory=set)

    def __call__(
        self, context: SolveContext, facts: Sequence[Fact], found: Targets, objective: Objective, modules: Modules
    ) -> Targets:
        self._take_anchors(context, list(found.wanted), objective, modules)
        parts = {aim: _values(context.model, facts, found, aim, modules) for aim in found.wanted}
        anchors = {aim: self.anchors[str(aim)] for aim in parts}
        far = torch.stack([value.norm(dim=-1) > TOO_LONG * anchors[aim] for aim, value in parts.items()]).any(0)
        wanted = {}
        for aim, value in parts.items():
            scaled = found.wanted[aim] + value * (anchors[aim] / value.norm(dim=-1, keepdim=True) - 1)
            wanted[aim] = torch.where(far[:, None], found.before[aim], scaled)
        for fact, one in zip(facts, far.tolist(), strict=True):
            if one and (fact.id, fact.prompt) not in self._far:  # another layer's value may be as long
                self._far.add((fact.id, fact.prompt))
                self.skipped.append(fact.subject)
        return found._replace(wanted=wanted)

    @property
    def notes(self) -> dict[str, Any]:
        return {"norm_anchors": dict(self.anchors), "skipped": list(self.skipped)}

    def tell(self, requests: int) -> None:
        if self.skipped:
            warn_user(
                f"NAS leaves {len(self.skipped)} of {count(requests, 'request')} as they are ({self.skipped[0]!r}): "
                f"the value that was found is more than {TOO_LONG:g} times as long as the anchor"
            )

    def _take_anchors(
        self, context: SolveContext, aims: list[TargetSite], objective: Objective, modules: Modules
    ) -> None:
        if all(str(aim) in self.anchors for aim in aims):
            return
        if len(self.sample) < FEW and not self.anchors:
            warn_user(
                f"NAS's anchor is a mean over {count(len(self.sample), 'fact')}; give norm_facts, {SAMPLE} of them"
            )
        with self.unedited():
            found = find_targets(context.model, self.sample, aims, context.contexts, objective, journal=self.journal)
            for aim in aims:
                norms = _values(context.model, self.sample, found, aim, modules).norm(dim=-1)
                self.anchors[str(aim)] = anchor_of(norms)


def anchor_of(norms: Float[Tensor, " fact"]) -> float:
    """The mean norm, without the longest twentieth."""
    kept = len(norms) - floor(LONGEST * len(norms))
    return float(norms.double().sort().values[:kept].mean())


def _values(
    model: TracedModel, facts: Sequence[Fact], found: Targets, aim: TargetSite, modules: Modules
) -> Float[Tensor, "fact d_model"]:
    """v*: what the module that is written is to add to the stream, or to make."""
    wanted = found.wanted[aim]
    if aim.site.kind is not Kind.RESID:
        return wanted
    site = Site(modules[aim], aim.site.layer)
    now = added(model, site, fact_values(model, facts, Contexts(), site, aim.position))
    return now.T.to(wanted) + wanted - found.before[aim]
