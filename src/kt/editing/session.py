"""`EditSession`: edits one after the other on one model, with what they remember of each other in one place.

    with kt.EditSession(model, method="alphaedit", keep_history=True) as session:
        for step in batches:
            session.edit(step)          # solved on the model as it stands, and written
        whole = session.total()         # all steps as one edit of the original weights
    # here the model holds its exact bytes again

Nothing is shared between sessions, and nothing lives in a module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import KtError
from ..facts.fact import Fact
from ..journal import Journal
from ..progress import Progress
from ..sites import Update
from .contexts import Contexts
from .edit import Edit
from .package import about_requests, about_weights, package, read_back
from .plan import Plan, Setting, State
from .prepare import Asked, probe_stages, read_requests, refuse_contradictions, take_statistics, trace_balance
from .readings import readings
from .statistics import Statistics

if TYPE_CHECKING:
    from ..model import TracedModel
    from ..probing import Stages
    from ..tracing import Balance

History = Mapping[str, Float[Tensor, "d_in d_in"]] | Sequence[Edit]
"""Keys that earlier edits wrote: those edits themselves, or by weight name the sum of k kᵀ over their keys."""


class EditSession:
    """See the module.

    Args:
        method: see `kt ls methods`.
        alpha: attention's share (eq. 13): a number, `auto` (traced), `per-fact` (each request's own, its column of ΔW
            scaled by it), or None for the preset's, and `auto` where there is no preset.
        statistics: second moments by module name; None takes them over `corpus` and caches them. The factors of a
            `Statistics` object are computed once for every edit that it is given to.
        context_templates: flat list or list of groups; None lets the model write the method's prefixes from `seed`.
        preset: hyper-parameters by name, or a TOML file; None finds the one that matches the model.
        variant: the preset's values for one data set (`zsre`, `mcf`).
        history: earlier edits whose keys are to be left alone, or by weight name the sum of their k kᵀ.
        alpha_facts: facts that `alpha="auto"` is traced on; None: the first requests that are edited.
        keep_history: whether later edits leave the keys of earlier ones alone; None asks the method (AlphaEdit does).
        norm_guard: rescale every wanted value to the norm that its site has before the session's first edit.
        journal: keeps every finished phase (templates, traced α, targets, each layer's update), so that the same
            session over the same journal goes on where it was cut off, with the same bytes.
        hyper_parameters: `layers` (or `layers_mlp`), `layers_attn`, `v_lr`, `v_num_grad_steps`, `v_weight_decay`,
            `kl_factor`, `clamp_norm_factor`, `mom2_update_weight`, `mom2_update_weight_attn`, `fact_token`, ...
    """

    def __init__(
        self,
        model: TracedModel,
        method: str = "intattn",
        alpha: float | str | None = None,
        statistics: Statistics | str | Path | None = None,
        context_templates: Sequence[str] | Sequence[Sequence[str]] | None = None,
        preset: str | None = None,
        variant: str | None = None,
        seed: int = 0,
        corpus: str = "demo",
        max_tokens: int = 100_000,
        progress: Progress | None = None,
        history: History | None = None,
        alpha_facts: Sequence[Fact] | None = None,
        keep_history: bool | None = None,
        norm_guard: bool = False,
        journal: Journal | None = None,
        **hyper_parameters: Any,
    ) -> None:
        self.model, self.seed, self.progress = model, seed, progress
        self.journal, self._solves = journal or Journal(), 0
        self.asked = Asked.of(model, method, alpha, preset, variant, hyper_parameters)
        self._history = _keys_of(history)
        self.state = State(self._history)
        self.keep_history, self.norm_guard = keep_history, norm_guard
        self.steps: list[Edit] = []
        self._requests: list[Fact] = []
        self._alpha_facts = alpha_facts
        self._given = (statistics, corpus, max_tokens)
        self._statistics: Statistics | None = None
        self._contexts = Contexts.of(context_templates) if context_templates else None
        self._balance: Balance | None = None
        self._stages: Stages | None = None
        self._original: dict[str, Tensor] = {}

    # One edit ---------------------------------------------------------------------------------------------------
    def solve(self, requests: Sequence[Fact | Mapping[str, Any]]) -> Edit:
        """An edit of the model as it stands; nothing is written or remembered."""
        running = dict(self.state.running)
        try:
            return self._solve(requests)[0]
        finally:
            self.state.running = running

    def edit(self, requests: Sequence[Fact | Mapping[str, Any]]) -> Edit:
        """Solve, write, remember what the next edit has to know. A failure leaves model and session as they were."""
        running = dict(self.state.running)
        result, plan, setting, facts = self._solve(requests)
        before = self.model.copies(result.names)
        try:
            result.write(self.model)
            if self.keeps_history:
                plan.remember(setting, facts)
        except BaseException:
            self.model.put_back(before)
            self.state.running = running
            raise
        self._original = before | self._original
        self.steps.append(result)
        self._requests += facts
        return result

    def _solve(self, requests: Sequence[Fact | Mapping[str, Any]]) -> tuple[Edit, Plan, Setting, list[Fact]]:
        self.model.require_weights("an edit")
        self._solves += 1
        facts = read_requests(self.model, requests)
        refuse_contradictions(facts)
        balance = self._trace(facts) if self.asked.needs_trace else None
        hp = self.asked.settle(self.model, balance, self._probe(facts) if self.asked.needs_probe else None)
        own = self.asked.alphas(facts, balance)
        hp = hp if own is None else replace(hp, alpha=own)
        plan = self.asked.method.recipe(hp)
        self._refuse(plan)
        setting = self._setting(plan)
        solved = plan.solve(setting, facts, self.progress)
        return package(setting, facts, self.asked.name, hp, plan, solved), plan, setting, facts

    def _refuse(self, plan: Plan) -> None:
        """What cannot be done with this method, before any work."""
        name = self.asked.name
        written = plan.names(self.model)
        for weight in written:
            self.model.own(weight)  # there, on a device, and not quantised
        if not written:
            raise KtError(
                "the edit would write nothing: no layers for a module whose share is above zero; check alpha and layers"
            )
        if self.norm_guard and not plan.has_targets:
            raise KtError(f"norm_guard rescales the values that are aimed at, and {name} has none; leave it out")
        if (self.keep_history or self._history) and not plan.keeps_keys:
            raise KtError(f"{name} has no place for earlier edits' keys; leave keep_history and history out")
        for weight, keys in self._history.items():
            width = self.model.weight(weight).shape[-1]
            if len(keys) != width:
                raise KtError(
                    f"history of {weight}: keys of {len(keys)} numbers where the weight reads {width}; "
                    "give keys of this model"
                )
        plan.require_room(self.model)

    @property
    def keeps_history(self) -> bool:
        """Whether later edits leave the keys of earlier ones alone."""
        return self.asked.method.keeps_history if self.keep_history is None else self.keep_history

    def _setting(self, plan: Plan) -> Setting:
        """Texts and second moments are the original model's, taken once."""
        with self.unedited():
            if self._contexts is None:
                make = self.asked.method.contexts
                self._contexts = Contexts(self.journal.take("contexts", lambda: make(self.model, self.seed).groups))
            if self._statistics is None:
                self._statistics = take_statistics(self.model, plan.moment_sites, *self._given, self.progress)
        original = None
        if self.norm_guard:
            self._original = self.model.copies(plan.names(self.model)) | self._original
            original = self.unedited
        journal = self.journal.within(f"solve-{self._solves:05d}")
        return Setting(self.model, self._statistics, self._contexts, self.state, original, self.seed, journal)

    def _trace(self, facts: list[Fact]) -> Balance | None:
        """What α and layers come from: of each batch for an α a fact, else of the first one, on the original model."""
        if self._balance is not None and self.asked.alpha != "per-fact":
            return self._balance
        with self.unedited():
            own = self.asked.alpha == "per-fact" or not self._alpha_facts
            chosen = list(facts if own else self._alpha_facts or ())
            journal = self.journal.within(f"solve-{self._solves:05d}-trace")
            balance = trace_balance(self.model, chosen, self.asked, self.seed, journal)
        self._balance = balance
        return balance

    def _probe(self, facts: list[Fact]) -> Stages | None:
        """What JEEP's regions come from: the first batch, on the original model."""
        if self._stages is None:
            with self.unedited():
                self._stages = probe_stages(self.model, self._alpha_facts or facts)
        return self._stages

    # All of them ------------------------------------------------------------------------------------------------
    @contextmanager
    def unedited(self) -> Iterator[TracedModel]:
        """The weights from before the first edit, inside the block."""
        now = self.model.copies(self._original)
        self.model.put_back(self._original)
        try:
            yield self.model
        finally:
            self.model.put_back(now)

    def norm_ratios(self) -> dict[str, float]:
        """By weight, its Frobenius norm over the one it had before the first edit."""
        norms = {
            name: (float(self.model.own(name).float().norm()), float(old.float().norm()))
            for name, old in self._original.items()
        }
        return {name: now / before for name, (now, before) in norms.items() if before}

    def total(self) -> Edit:
        """All steps as one edit of the original weights. Where weights have 16 bits, every step was rounded when it was
        written; the total is rounded once.

        Raises:
            KtError: nothing was edited.
        """
        if not self.steps:
            raise KtError("nothing was edited in this session; call edit first")
        updates: dict[str, Update] = {}
        for name in dict.fromkeys(name for step in self.steps for name in step.names):
            parts = [step.updates[name] for step in self.steps if name in step.updates]
            updates[name] = parts[0]
            for part in parts[1:]:
                updates[name] = updates[name].plus(part)
        with self.unedited():
            kept = (
                "method",
                "alpha",
                "hyper_parameters",
                "aims",
                "context_templates",
                "statistics",
                "norm_guard",
                "seed",
            )
            manifest = {name: self.steps[-1].manifest[name] for name in kept} | {
                "steps": [len(step.requests) for step in self.steps]
            }
            manifest |= about_weights(self.model, updates) | about_requests(self._requests)
            keys = {
                name: torch.cat([s.keys[name] for s in self.steps if name in s.keys]) for name in self.steps[-1].keys
            }
            whole = Edit(updates, manifest, keys=keys)
            read_back(self.model, whole, self._requests, readings(self.model, self._requests))
        return whole

    def revert(self) -> None:
        """The exact bytes from before the first edit; the session begins anew."""
        self.model.put_back(self._original)
        self._original, self.steps, self._requests = {}, [], []
        self.state = State(self._history)

    def __enter__(self) -> EditSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.model.put_back(self._original)


def _keys_of(history: History | None) -> dict[str, Float[Tensor, "d_in past"]]:
    """Keys as columns. A sum of k kᵀ gives back columns with the same sum: all that a solve makes of them."""
    state = State()
    if isinstance(history, Mapping):
        return {name: _columns(name, gram) for name, gram in history.items()}
    for edit in history or ():
        for name, keys in edit.keys.items():
            state.add_keys(name, keys.T)
    return state.keys


def _columns(name: str, gram: Float[Tensor, "d_in d_in"]) -> Float[Tensor, "d_in past"]:
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
        raise KtError(f"history of {name} is {tuple(gram.shape)}; give the square sum of k kᵀ, or earlier edits")
    values, vectors = torch.linalg.eigh(gram.double().cpu())
    kept = values > 1e-13 * values.max().clamp(min=1e-300)
    return vectors[:, kept] * values[kept].sqrt()
