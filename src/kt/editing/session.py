"""`EditSession`: edits one after the other on one model, with what they remember of each other in one place.

    with kt.EditSession(model, method="alphaedit", keep_history=True) as session:
        for step in batches:
            session.edit(step)          # solved on the model as it stands, and written
        whole = session.total()         # all steps as one edit of the original weights
    # here the model holds its exact bytes again

Nothing is shared between sessions, and nothing lives in a module.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from .._util.progress import Progress
from ..errors import KtError
from ..facts.fact import Fact
from ..model.update import Update
from ..runs.journal import Journal
from .closed_form.contexts import Contexts
from .closed_form.second_moment import Statistics
from .edit import Edit
from .package import about_requests, about_weights, package, read_back
from .plan import EditHistory, Plan, SolveContext
from .resolve import MethodRequest, probe_stages, read_requests, refuse_contradictions, take_statistics, trace_balance
from .rounding import readings
from .stack import EditStack

if TYPE_CHECKING:
    from ..model.model import TracedModel
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
        self.asked = MethodRequest.of(model, method, alpha, preset, variant, hyper_parameters)
        self._history = _keys_of(history)
        self.state = EditHistory(self._history)
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
                plan.update_history(setting, facts)
        except BaseException:
            self.model.put_back(before)
            self.state.running = running
            raise
        self._original = before | self._original
        self.steps.append(result)
        self._requests += facts
        return result

    def _solve(self, requests: Sequence[Fact | Mapping[str, Any]]) -> tuple[Edit, Plan, SolveContext, list[Fact]]:
        self.model.require_weights("an edit")
        self._solves += 1
        facts = read_requests(self.model, requests)
        refuse_contradictions(facts)
        balance = self._trace(facts) if self.asked.needs_trace else None
        hp = self.asked.resolve(self.model, balance, self._probe(facts) if self.asked.needs_probe else None)
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

    def _setting(self, plan: Plan) -> SolveContext:
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
        return SolveContext(self.model, self._statistics, self._contexts, self.state, original, self.seed, journal)

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
        self.state = EditHistory(self._history)

    def __enter__(self) -> EditSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.model.put_back(self._original)


def _keys_of(history: History | None) -> dict[str, Float[Tensor, "d_in past"]]:
    """Keys as columns. A sum of k kᵀ gives back columns with the same sum: all that a solve makes of them."""
    state = EditHistory()
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


# Editing on top of earlier edits: they stand in the model while the new one is solved, and their keys are held.
#
# What belongs to the model rather than to its state (context templates, second moments, the trace that gives α) is
# taken from the base, before the earlier edits are written in: with the same seed it is what the first edit had.


class SessionOnEdits(EditSession):
    """An `EditSession` on a model that `below` is written into; the base's exact bytes are back on exit.

    Args:
        below: the earlier edits, in order. What is solved names them (`stands_on` in its manifest).
        requests: facts that a trace for α or a probe for layers is made of, where `alpha_facts` names none. (An α of
            each fact's own is traced batch by batch, on the model as the earlier edits leave it.)
        options: those of `EditSession`; `keep_history=False` leaves the earlier keys free, which any method can.

    Raises:
        KtError: an earlier edit does not fit, or the method has no place for earlier keys.
    """

    def __init__(self, model: TracedModel, below: EditStack, requests: Sequence[Fact], **options: Any) -> None:
        holds = options.get("keep_history") is not False
        super().__init__(model, history=below.edits if holds else None, **options)
        self.below = below
        self._first = list(requests)
        # A run that goes on with other edits below must not take up what was found on top of these.
        digests = "".join(layer.digest for layer in below.layers)
        self.journal = self.journal.within(f"on-{sha256(digests.encode()).hexdigest()[:16]}")
        self._around = ExitStack()
        if holds:
            warn_of_keyless(below)

    def __enter__(self) -> SessionOnEdits:
        self.below.grounds(self.model)  # fails before any work
        balance = self._trace(self._first) if self.asked.needs_trace else None
        hp = self.asked.resolve(self.model, balance, self._probe(self._first) if self.asked.needs_probe else None)
        plan = self.asked.method.recipe(hp)
        self._refuse(plan)
        self._setting(plan)
        self._original = {}  # a norm guard holds to the state that this session starts from
        self._around.enter_context(self.below.applied(self.model))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._around:
            super().__exit__(kind, error, trace)

    def _solve(self, requests: Any) -> tuple[Edit, Plan, SolveContext, list[Fact]]:
        found = super()._solve(requests)
        self._note(found[0])
        return found

    def total(self) -> Edit:
        whole = super().total()
        self._note(whole)
        return whole

    def _note(self, edit: Edit) -> None:
        edit.manifest["stands_on"] = [layer.digest for layer in self.below.layers]


def warn_of_keyless(below: EditStack) -> None:
    """Fine-tuning keeps no keys: such an edit is written in below, and nothing holds what it wrote."""
    for layer in below.layers:
        if not layer.edit.keys:
            warnings.warn(
                f"{layer.name} keeps no keys ({layer.edit.manifest.get('method')} has none): it is written in below, "
                "but nothing makes the new edit leave it alone",
                stacklevel=3,
            )


# `kt.edit`: requests and a method become an `Edit`; the model is left as it was.


def edit(
    model: TracedModel,
    requests: Sequence[Fact | Mapping[str, Any]],
    method: str = "intattn",
    alpha: float | str | None = None,
    **options: Any,
) -> Edit:
    """Solve an edit for all requests in one batch. `EditSession` edits in steps, `run_edits` in a mode and with scores.

    Args:
        requests: facts with a target (or a foil, which then is the target), or dicts as ROME and MEMIT write them.
        method: see `kt ls methods`.
        alpha: attention's share (eq. 13); see `EditSession`.
        options: all other arguments of `EditSession`: statistics, context_templates, preset, variant, seed, corpus,
            history, norm_guard, ..., and hyper-parameters by name.

    Raises:
        BadFact: a request without a subject in its prompt, with an empty or unchanged target, or two that contradict
            each other.
        UnknownSite: a layer that the model does not have.
        NotEnoughMemory: the solve's matrices would not fit.
        WorkFailed: the update is zero or not finite.
    """
    return EditSession(model, method, alpha, **options).solve(requests)
