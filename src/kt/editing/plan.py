"""A method comes down to a plan, which turns facts into updates of weights.

Three kinds of plan share it: `LocateThenEdit` (targets and a closed form), `FineTune` (gradient steps on the weights
themselves) and `UltraEdit` (one backward pass and a closed form).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from .._util.progress import Progress
from ..errors import KtError
from ..facts.fact import Fact
from ..model.sites import Site
from ..model.update import Dense, LowRank, Update
from ..runs.journal import Journal
from .closed_form.aims import TargetSite
from .closed_form.contexts import Contexts
from .closed_form.second_moment import Statistics

if TYPE_CHECKING:
    from ..model.effects import Effect
    from ..model.model import TracedModel
    from .closed_form.factor import Moment
    from .closed_form.norm_guards import NormGuard
    from .closed_form.targets import Targets


class WeightUpdate(NamedTuple):
    """One weight's update, scaled, and how it came about: the condition number of the system that was solved, the keys
    and the norm of the residual that was to be written, the numbers that were chosen (`lambda`, `x`, `share`: see
    closed_form.auto_ridge; `lr`, `norm_constraint`), and keys beside one a fact that the update meets too. None for
    what a plan does not have."""

    update: Update
    condition: float | None = None
    keys: Float[Tensor, "d_in fact"] | None = None
    residual_norm: float | None = None
    chosen: dict[str, float] | None = None
    also_met: Float[Tensor, "d_in met"] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields as a journal keeps them."""
        return self._asdict() | {"update": vars(self.update)}

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> WeightUpdate:
        """The update whose `as_dict` gave these fields."""
        parts = fields["update"]
        return cls(**{**fields, "update": LowRank(**parts) if "left" in parts else Dense(**parts)})


class SolveResult(NamedTuple):
    """A plan's result: updates by weight name, wanted values by aim, how the search for them ended, and numbers of
    the plan's own for the manifest (`loss`: the last one of a descent)."""

    written: dict[str, WeightUpdate]
    targets: dict[TargetSite, Float[Tensor, "fact d_model"]] = {}  # noqa: RUF012 -- nobody writes into a result
    search: dict[TargetSite, Targets] = {}  # noqa: RUF012
    notes: dict[str, Any] = {}  # noqa: RUF012
    effect: Effect | None = None
    """What is added to the model instead of an update."""
    asked: Sequence[Fact] | None = None
    """The requests that the rows of `search` are of, where they are not the facts: the parts of long answers."""


class EditHistory:
    """A session's memory of the edits it made. Never shared between sessions.

    `keys`: by weight name, the keys that earlier edits wrote and later ones are to leave alone (AlphaEdit's cache).
    `values`: what the weight makes of them after the edit that wrote them, for solvers that restore.
    `running`: by weight name, the running mean and variance that UltraEdit normalises with, LyapLock's queue.
    """

    def __init__(self, keys: Mapping[str, Float[Tensor, "d_in past"]] | None = None) -> None:
        self.keys: dict[str, Tensor] = dict(keys or {})
        self.values: dict[str, Tensor] = {}
        self.running: dict[str, Any] = {}

    def copy(self) -> EditHistory:
        """The memory as it is now; later edits add to one of them only."""
        other = EditHistory(self.keys)
        other.values, other.running = dict(self.values), dict(self.running)
        return other

    def add_keys(self, name: str, keys: Float[Tensor, "d_in fact"]) -> None:
        _append(self.keys, name, keys)

    def add_values(self, name: str, values: Float[Tensor, "d_out fact"]) -> None:
        _append(self.values, name, values)


def _append(parts: dict[str, Tensor], name: str, columns: Float[Tensor, "d fact"]) -> None:
    columns = columns.detach().to("cpu", torch.float64)
    parts[name] = torch.cat([parts[name], columns], 1) if name in parts else columns


@dataclass(frozen=True)
class SolveContext:
    """Everything that the solves of a session have in common.

    `guard`, where given, rescales wanted values (closed_form.norm_guards). `journal` keeps what a solve has finished.
    `batch` has the keys of the facts that a solve fact by fact has written before; `told`, what a warning of this solve
    has said, which another weight or fact does not say again. `changes` gives what the session's
    edits have added to each weight so far, `unedited` puts the weights from before them in place.
    """

    model: TracedModel
    statistics: Statistics
    contexts: Contexts
    state: EditHistory = field(default_factory=EditHistory)
    guard: NormGuard | None = None
    seed: int = 0
    journal: Journal = field(default_factory=Journal)
    batch: EditHistory = field(default_factory=EditHistory)
    told: set[str] = field(default_factory=set)
    changes: Callable[[], Mapping[str, Update]] = dict
    unedited: Callable[[], AbstractContextManager[Any]] = nullcontext

    def moment(self, name: str, size: int) -> Moment:
        """The second moment of a weight's keys.

        Raises:
            KtError: it is of keys of another size.
        """
        parts = self.model.weight_names(name)
        statistics = self.statistics
        moment = statistics.moment_of(name) if parts == [name] else statistics.moment_of_parts(name, parts)
        if moment.size != size:
            raise KtError(
                f"the second moment of {name} has size {moment.size}, its keys {size}; "
                "take the statistics of this model"
            )
        return moment

    def within(self, part: str) -> SolveContext:
        """The same for a part of the work, whose phases have names of their own."""
        return replace(self, journal=self.journal.within(part))


class PlanText(NamedTuple):
    """A plan in words: where targets are searched for, what is written, by which formula, in which order."""

    searched: str
    written: str
    solver: str
    order: str


class Plan(Protocol):
    """How a method edits. The model's weights are the same bytes after `solve`, also after an exception."""

    @property
    def moment_sites(self) -> list[Site]:
        """The weights whose second moment the solve will ask for."""

    @property
    def keeps_keys(self) -> bool:
        """Whether earlier edits' keys (`State.keys`) change the solve."""

    @property
    def has_targets(self) -> bool:
        """Whether it searches for wanted values, which a norm guard can rescale."""

    @property
    def whole_blocks(self) -> bool:
        """Whether it writes every parameter of a block, among them such that are no linear map's."""

    def describe(self) -> PlanText:
        """The plan in words."""

    def names(self, model: TracedModel) -> list[str]:
        """The weights that it writes."""

    def require_room(self, model: TracedModel) -> None:
        """Refuse, before any work, what this machine's memory cannot hold."""

    def solve(self, context: SolveContext, facts: Sequence[Fact], progress: Progress | None = None) -> SolveResult: ...

    def update_history(self, context: SolveContext, facts: Sequence[Fact]) -> None:
        """After the write: what the next solve of the session has to know of these facts."""


def reads_contexts(plan: Plan) -> bool:
    """Whether a plan reads the context templates: one that searches for wanted values, unless it says otherwise."""
    return bool(getattr(plan, "reads_contexts", plan.has_targets))


class WithoutSearch:
    """Base of the plans that search for no values, and ask for no second moment and no earlier keys."""

    moment_sites: list[Site] = []  # noqa: RUF012 -- nobody adds to it
    keeps_keys = False
    has_targets = False
    whole_blocks = False


class EffectPlan(WithoutSearch):
    """Base of the plans that leave every weight alone: they write none, and their result is an effect."""

    def names(self, model: TracedModel) -> list[str]:
        return []

    def require_room(self, model: TracedModel) -> None:
        """Nothing large is computed."""

    def update_history(self, context: SolveContext, facts: Sequence[Fact]) -> None:
        """Entries of one place act as one (`Effect.plus`), so the next solve has nothing to know."""
