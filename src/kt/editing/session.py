"""`EditSession`: edits one after the other on one model, with what they remember of each other in one place.

    with kt.EditSession(model, method="alphaedit", keep_history=True) as session:
        for step in batches:
            session.edit(step)          # solved on the model as it stands, and written
        whole = session.total()         # all steps as one edit of the original weights
    # here the model holds its exact bytes again

Nothing is shared between sessions, and nothing lives in a module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from functools import cache
from math import ceil, prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from .._util.kinds import require_kinds, shown, takes
from .._util.notebook_bar import with_bar
from .._util.progress import Progress
from ..errors import KtError, warn_user
from ..facts.fact import Fact
from ..facts.load import FactsLike, facts_from
from ..model.devices import require_gradients
from ..model.effects import without
from ..model.model import TracedModel
from ..model.update import Update
from ..runs.journal import Journal
from .apply import MatchedWeights, fingerprints, refuse_changed
from .closed_form.contexts import Contexts
from .closed_form.norm_guards import GUARDS, SAMPLE, NormAnchor, NormGuard, OwnNorm
from .closed_form.second_moment import Statistics
from .config import Config, one_of
from .edit import Edit
from .method_names import MethodLike
from .package import about_requests, about_weights, package, read_back
from .plan import EditHistory, EffectPlan, Plan, SolveContext, SolveResult, reads_contexts
from .resolve import (
    Evidence,
    configure,
    distinct_requests,
    is_per_fact,
    read_requests,
    resolve,
    take_statistics,
    with_alphas,
)
from .rounding import readings
from .session_options import ARGUMENT_KINDS, TEXTS, SessionOptions, keys_of
from .stack import joined
from .update_guards import UPDATE_GUARDS, added, prune, rect, simie, sphere
from .verdict import TextReading, text_reading

if TYPE_CHECKING:
    from ..model.effects import Effect
    from ..model.weights import Copy
    from ..model.writer import Kept

IN_TURN = "-in-turn"
"""Behind the name of a solve's phases where an older kt read texts of a prompt in another turn of the chat template:
they are solved anew, and so is all that comes after them in the session."""


class EditSession:
    """Edits one after the other on one model. On leaving the block the model has its exact bytes again.

    A session holds what its edits have to know of each other: earlier keys, running moments, first norms.

    Args:
        model: the model that is edited.
        config: a method's configuration, or a method's name (see `kt ls methods`), which `options` then configure.
        statistics: second moments by module name; None takes them over `corpus` and caches them. The factors of a
            `Statistics` object are computed once for every edit that it is given to. A method that takes none says so.
        context_templates: flat list or list of groups; None lets the model write the method's prefixes from `seed`.
            A method that reads none says so.
        seed: of every random draw.
        journal: keeps every finished phase (templates, traced α, targets, each layer's update), so that the same
            session over the same journal goes on where it was cut off, with the same bytes.
        progress: called with what is done and what there is to do.
        options: the fields of `SessionOptions`. With a method's name also `alpha` (attention's share, eq. 13: a number,
            `auto` for a traced one, `per-fact` for each request's own, by which its column of ΔW is scaled; None for
            the preset's, and `auto` where there is none), `preset` (by name, or a TOML file; None finds the one that
            matches the model), `variant` (its values for one data set: `zsre`, `mcf`) and hyper-parameters by name:
            `layers` (or `layers_mlp`), `layers_attn`, `v_lr`, `mom2_update_weight`, ... `method` is another word for
            `config`.

    Raises:
        KtError: an unknown method or name, or a value that cannot be.

    Examples:
        >>> with kt.EditSession(model, method="ft", num_steps=2) as session:
        ...     edits = [session.edit([fact]) for fact in facts[:2]]
        ...     whole = session.total()
        >>> len(edits), len(whole.requests)
        (2, 2)
    """

    def __init__(
        self,
        model: TracedModel,
        config: MethodLike = "intattn",
        alpha: float | str | None = None,
        *,
        method: MethodLike | None = None,
        statistics: Statistics | str | Path | None = None,
        context_templates: Sequence[str] | Sequence[Sequence[str]] | None = None,
        seed: int = 0,
        journal: Journal | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        config = config if method is None else method
        given: dict[str, Any] = {"model": model, "method": config, "statistics": statistics, "seed": seed}
        given |= {"journal": journal, "context_templates": context_templates, "progress": progress}
        require_kinds(given, ARGUMENT_KINDS)
        own = {spec.name: options.pop(spec.name) for spec in fields(SessionOptions) if spec.name in options}
        self.model, self.seed, self.progress = model, seed, progress
        self.journal, self._solves = journal or Journal(), 0
        self._turned = False
        for name in {"alpha_facts", "norm_facts", "requests"} & own.keys():
            own[name] = own[name] and facts_from(own[name])
        self.options = SessionOptions(**own)
        if isinstance(self.options.norm_guard, str):
            one_of(self.options.norm_guard, GUARDS, "norm_guard")
        if self.options.update_guard is not None:
            one_of(self.options.update_guard, UPDATE_GUARDS, "update_guard")
        if self.options.norm_facts is not None and self.options.norm_guard != "nas":
            raise KtError("norm_facts are those that NAS's anchor is taken from; give norm_guard='nas' with them")
        if isinstance(config, str):
            config = configure(model, config, alpha, **options)
        elif options or alpha is not None:
            raise KtError(f"{next(iter([*options, 'alpha']))} belongs into the configuration; make it with its value")
        config.require(model)
        self.options.refuse_unfit(config)
        if not self.journal.done:  # a run of an older version goes on under the names it was begun with
            config.refuse_old_names()
        self.config = config
        self._anchors: dict[str, float] = {}
        self._solved: dict[str, Update] = {}  # PRUNE: the sums of what the steps solved, before it restrained them
        self._solving: dict[str, Update] = {}
        self._history = model.by_whole(keys_of(self.options.history))
        self.state = EditHistory(self._history)
        self.steps: list[Edit] = []
        self.unwritten: list[Fact] = []  # requests of steps that had nothing to write, which the caller went on behind
        self._requests: list[Fact] = []
        self._given_statistics, self._told = statistics, False
        self._statistics: Statistics | None = None
        for group in context_templates or ():
            if not isinstance(group, Sequence) or not group:
                raise KtError(f"context_templates holds {shown(group)}; give {TEXTS}")
        self._contexts = Contexts.of(context_templates) if context_templates else None
        self._given_templates = self._contexts is not None
        self._evidence = Evidence()
        self._original: dict[str, Copy] = {}  # before the first edit: of what steps wrote, and a norm guard reads
        self._written: set[str] = set()
        self._left: dict[str, str] = {}  # of one that was not: each written weight's fingerprint, as its steps left it
        self._held: list[Kept] = []  # of a session that was entered: what leaving it puts back
        self._inside = self._ended = False
        self._texts: dict[int, TextReading | None] = {}  # by number of steps, so that none is read twice

    # One edit ---------------------------------------------------------------------------------------------------
    def solve(self, requests: FactsLike) -> Edit:
        """An edit for `requests` of the model as it stands; nothing is written or remembered."""
        self._require_open("solve")
        with self._remembered(kept=False):
            return self._solve(requests)[0]

    def edit(self, requests: FactsLike) -> Edit:
        """Solve `requests`, write them, remember what the next edit has to know. A failure leaves model and session as
        they were.
        """
        self._require_open("edit")
        with self._remembered():
            result, plan, context, facts = self._solve(requests)
            with self.model.writing():
                with self.model.undone_on_failure(result.names) as (before, effects):
                    foreign = [] if self._inside else self._changed(before)
                    result.write(self.model)
                    if self.keeps_history:
                        plan.update_history(context, facts)
                self._original = before | self._original
                self._written |= before.keys()
                if self._inside:
                    self._hold(before, effects, result)
                else:  # a weight that somebody wrote between two steps keeps its old mark: it counts as changed
                    own = [name for name in before if name not in foreign]
                    self._left |= fingerprints(self.model, own)
            self.steps.append(result)
        self._solved = self._solving
        self._texts[len(self.steps)] = text_reading(result.manifest, "after")
        self._requests += facts
        return result

    @contextmanager
    def _remembered(self, kept: bool = True) -> Iterator[None]:
        """What an edit adds to the session's memory is taken back where the block fails, or is not to be kept."""
        state, anchors = self.state.copy(), dict(self._anchors)
        try:
            yield
        except BaseException:
            kept = False
            raise
        finally:
            if not kept:
                self.state, self._anchors = state, anchors

    def _solve(self, requests: FactsLike) -> tuple[Edit, Plan, SolveContext, list[Fact]]:
        self.model.require_weights("an edit")
        require_gradients("an edit")
        self._solves += 1
        self._original = self._before_steps()
        facts = distinct_requests(read_requests(self.model, requests), self.options.strict)
        with self.model.at_rest():
            config = self._resolve(facts)
            plan = config.plan()
            if self.options.hold:
                options = self.options
                guard, keep = options.norm_guard, options.keep_history
                if guard is None and plan.has_targets:
                    guard = "kt"
                if keep is None:
                    keep = plan.keeps_keys and options.update_guard != "simie"
                self.options = replace(options, hold=False, keep_history=keep, norm_guard=guard)
            self._refuse(plan)
            self._warn_of_unused(plan)
            context = self._context(plan, facts)
            if self.options.update_guard == "simie":  # solves as if there were no earlier edits
                with self.unedited():
                    solved = plan.solve(replace(context, changes=dict), facts, self.progress)
            else:
                solved = plan.solve(context, facts, self.progress)
            solved = self._restrained(solved, context, facts)
            known = self._texts.get(len(self.steps))
            result = package(context, facts, config, plan, solved, self.options.check, known)
        self._texts[len(self.steps)] = text_reading(result.manifest, "before")
        if self.options.update_guard is not None:
            result.manifest["update_guard"] = self.options.update_guard
        return self._note_sources(result), plan, context, facts

    def _restrained(self, solved: SolveResult, context: SolveContext, facts: Sequence[Fact]) -> SolveResult:
        """The solved updates as the update guard leaves them."""
        updates = {name: written.update for name, written in solved.written.items()}
        if self.options.update_guard == "rect":
            changed = {
                n: sum(prod(u.shape) for u in self.model.by_part(n, update).values()) for n, update in updates.items()
            }
            updates = {name: rect(update, self.model.weight(name), changed[name]) for name, update in updates.items()}
        elif self.options.update_guard == "sphere":
            updates = {name: sphere(update, self.model.weight(name)) for name, update in updates.items()}
        elif self.options.update_guard == "prune":
            self._solving, stands = added(self._solved, updates), context.changes()
            with self.unedited():
                first = {name: self.model.weight(name).clone() for name in updates}
            whole = {name: prune(self._solving[name], first[name]) for name in updates}
            updates = {n: u.plus(stands[n].scaled(-1.0)) if n in stands else u for n, u in whole.items()}
        elif self.options.update_guard == "simie":
            updates = simie(context, facts, updates)
        written = {name: each._replace(update=updates[name]) for name, each in solved.written.items()}
        return solved._replace(written=written)

    def _changes(self) -> dict[str, Update]:
        """What the steps so far have added to each weight, in float64."""
        changes: dict[str, Update] = {}
        for step in self.steps:
            wide = {name: update.to(torch.float64) for name, update in step.updates.items()}
            changes = added(changes, self.model.whole_updates(wide))
        return changes

    def _resolve(self, facts: Sequence[Fact]) -> Config:
        """The configuration with layers and α from the unedited model, chosen once; an α of each fact's own is traced
        for every batch."""
        if not (self.config.missing_layers or self.config.traces_alpha):
            return resolve(self.config, self.model, facts)[0]
        per_fact, named = is_per_fact(self.config), self.options.alpha_facts
        known: dict[str, Any] = {"known": self._evidence, "seed": self.seed, "alpha_facts": named}
        known["journal"] = self.journal.within(f"solve-{self._solves:05d}-trace")
        asked = facts if per_fact else self.options.requests or facts
        with self.unedited():
            config, self._evidence = resolve(self.config, self.model, asked, **known)
        if per_fact and self._evidence.balance is not None:
            config = with_alphas(config, facts, self._evidence.balance)
        return config

    def _note_sources(self, edit: Edit) -> Edit:
        """Into the manifest: where the settings come from that nobody gave."""
        if self._evidence.sources:
            edit.manifest["sources"] = dict(self._evidence.sources)
        return edit

    def _warn_of_unused(self, plan: Plan) -> None:
        """Say once that the method reads no context templates, or no second moments; a warning, since they are given to
        all methods alike."""
        if self._given_statistics is not None and not plan.moment_sites and not self._told:
            warn_user(
                f"statistics are without effect: {self.config.name}, as it is set, takes no second moments; leave them "
                "out"
            )
            self._told = True
        if self._given_templates and not reads_contexts(plan):
            warn_user(
                f"context_templates are without effect: {self.config.name} reads the requests' own prompts; leave them "
                "out"
            )
            self._given_templates = False

    def _refuse(self, plan: Plan) -> None:
        """Refuse, before any work, what this method cannot do to this model."""
        written = plan.names(self.model)
        for weight in written:
            for part in self.model.weight_names(weight):
                self.model.own(part)  # there, on a device, and not quantised
        if not written and not isinstance(plan, EffectPlan):
            raise KtError(
                "the edit would write nothing: no layers for a module whose share is above zero; check alpha and layers"
            )
        for weight, keys in self._history.items():
            width = self.model.key_size(self.model.site_of(weight))
            if len(keys) != width:
                raise KtError(
                    f"history of {weight}: keys of {len(keys)} numbers where the weight reads {width}; "
                    "give keys of this model"
                )
        plan.require_room(self.model)

    @property
    def keeps_history(self) -> bool:
        """Whether later edits leave the keys of earlier ones alone."""
        kept, simie = self.options.keep_history, self.options.update_guard == "simie"
        return (self.config.keeps_history and not simie) if kept is None else kept

    def _context(self, plan: Plan, facts: Sequence[Fact]) -> SolveContext:
        """Texts and second moments are the original model's, taken once."""
        with self.unedited():
            if self._contexts is None:
                write = self.config.contexts
                self._contexts = Contexts(self.journal.take("contexts", lambda: write(self.model, self.seed).groups))
            if self._statistics is None:
                given, options = self._given_statistics, self.options
                self._statistics = take_statistics(
                    self.model, plan.moment_sites, given, options.corpus, options.max_tokens, self.progress
                )
        self._turned |= any(self._contexts.turned(fact, self.model.reader) for fact in facts)
        revised = f"-r{self.config.revision}" if self.config.revision else ""
        journal = self.journal.within(f"solve-{self._solves:05d}" + IN_TURN * self._turned + revised)
        guard = self._guard(plan, facts)
        return SolveContext(
            self.model,
            self._statistics,
            self._contexts,
            self.state,
            guard,
            self.seed,
            journal,
            changes=cache(self._changes),
            unedited=self.unedited,
        )

    def _guard(self, plan: Plan, facts: Sequence[Fact]) -> NormGuard | None:
        """The norm guard of one edit; NAS's anchors are the session's."""
        options = self.options
        if not options.norm_guard:
            return None
        self._original = self.model.copies(plan.names(self.model)) | self._original
        if options.norm_guard != "nas":
            return OwnNorm(self.unedited)
        given = options.norm_facts
        sample = (options.requests or facts) if given is None else read_requests(self.model, given)
        sample = sample[:: ceil(len(sample) / SAMPLE)]
        assert self._contexts is not None
        turned = any(self._contexts.turned(fact, self.model.reader) for fact in sample)
        return NormAnchor(self.unedited, sample, self.journal.within("nas" + IN_TURN * turned), self._anchors)

    # All of them ------------------------------------------------------------------------------------------------
    @property
    def _effects(self) -> tuple[Effect, ...]:
        """The model's effects but for those of the session's own steps."""
        return without(self.model.effects, [step.effect for step in self.steps if step.effect is not None])

    def _before_steps(self) -> dict[str, Copy]:
        """The bytes of the weights that a step wrote. Others, which a norm guard took, are not to be written back."""
        return {name: kept for name, kept in self._original.items() if name in self._written}

    def _before(self, name: str) -> Tensor:
        """A weight from before the first edit."""
        kept = self._original.get(name)
        return self.model.weight(name) if kept is None else self.model.tensor_of(name, kept)

    def _hold(self, before: Mapping[str, Copy], effects: Sequence[Effect], edit: Edit) -> None:
        """Among the model's open blocks, from before the write: what an earlier one, left inside the session, brings
        back is from before both, and it says so."""
        known = {name for kept in self._held for name in kept.copies}
        copies = {name: self._original[name] for name in before if name not in known}
        if copies or edit.effect is not None or not self._held:
            self._held.append(self.model.begin(copies, effects))

    def _changed(self, names: Iterable[str]) -> list[str]:
        """Those of these weights that somebody has written since the session's own steps wrote them."""
        known = [name for name in names if name in self._left]
        now = fingerprints(self.model, known)
        return [name for name in known if now[name] != self._left[name]]

    def _refuse_changed(self) -> None:
        """Nothing holds the weights of a session that is not entered: what others wrote since is not overwritten.

        Raises:
            KtError: they did.
        """
        taken = MatchedWeights({name: self._original[name] for name in self._left}, self._left)
        refuse_changed(taken, self.model, "the session's revert(force=True)", "the session's last edit")

    def _let_go(self, ended: bool = True) -> None:
        """Put the weights and effects from before the session's writes back, the last first."""
        if not self._inside:
            self.model.put_back(self._before_steps(), self._effects)
            return
        with self.model.writing(), ExitStack() as blocks:
            for kept in self._held:
                blocks.callback(self.model.end, kept, ended)
            self._held = []

    @contextmanager
    def unedited(self) -> Iterator[TracedModel]:
        """The weights (and effects) from before the first edit, inside the block."""
        with self.model.restored(self._original):
            self.model.put_back(self._original, self._effects)
            yield self.model

    def norm_ratios(self) -> dict[str, float]:
        """By weight, its Frobenius norm over the one it had before the first edit."""
        norms = {
            name: (float(self.model.weight(name).float().norm()), float(self._before(name).float().norm()))
            for name in self._original
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
                "written_aims",
                "context_templates",
                "statistics",
                "norm_guard",
                "seed",
            )
            manifest = {name: self.steps[-1].manifest[name] for name in kept} | {
                "steps": [len(step.requests) for step in self.steps]
            }
            if self.options.update_guard is not None:
                manifest["update_guard"] = self.options.update_guard
            if path := getattr(self.config, "editor", ""):
                from .hyper.editor import seen_of_steps

                manifest |= seen_of_steps(self.steps, path, self._requests)
            if self.unwritten:
                manifest["unwritten"] = [fact.subject for fact in self.unwritten]
            if unfound := [name for step in self.steps for name in step.manifest.get("not_found", ())]:
                manifest["not_found"] = unfound
            if (skipped := [name for step in self.steps for name in step.manifest.get("skipped", ())]) or self._anchors:
                manifest |= {"norm_anchors": dict(self._anchors), "skipped": skipped}
            manifest |= about_weights(self.model, updates) | about_requests(self._requests)
            keys = _keys_of_steps(self.steps)
            whole = Edit(updates, manifest, keys=keys, effect=joined(self.steps))
            before = readings(self.model, self._requests)
            read_back(self.model, whole, self._requests, before, text=self._texts.get(0))
        return self._note_sources(whole)

    def revert(self, force: bool = False) -> None:
        """The exact bytes from before the first edit; the session begins anew.

        Raises:
            KtError: the session was not entered, and the weights were changed since its last edit (`force` puts the
                bytes back anyway).
        """
        self._require_open("revert")
        with self.model.writing():
            if not force:
                self._refuse_changed()
            self._let_go()
        self._left = {}
        self._original, self.steps, self._requests, self._solved, self._anchors = {}, [], [], {}, {}
        self._written = set()
        self.unwritten = []
        self._texts = {0: self._texts.get(0)}
        self.state = EditHistory(self._history)

    def __enter__(self) -> EditSession:
        self._refuse_entry()
        self._refuse_changed()
        self._left, self._inside = {}, True  # from here on an open block holds them
        if self.steps:  # written before the block, which takes them back
            with self.model.writing():
                self._held.append(self.model.begin(self._before_steps(), self._effects))
        return self

    def _refuse_entry(self) -> None:
        self._require_open("entering it again")
        if self._inside:
            raise KtError("the session is entered already; make another EditSession to edit beside it")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = True
        self._let_go(kind is None)

    def _require_open(self, what: str) -> None:
        """Refuse what would write a model that nothing takes back any more."""
        if self._ended:
            raise KtError(f"the session has ended, and {what} comes too late; make a new EditSession")


def _keys_of_steps(steps: Sequence[Edit]) -> dict[str, Float[Tensor, "fact d_in"]]:
    """By weight, the keys of all steps. An expert that a step did not write has keys of zero there."""
    widths = {name: keys.shape[1] for step in steps for name, keys in step.keys.items()}
    counts = [len(next(iter(step.keys.values()), ())) for step in steps]
    blank = [{name: torch.zeros(n, width) for name, width in widths.items() if "[" in name} for n in counts]
    every = [each | dict(step.keys) for each, step in zip(blank, steps, strict=True)]
    return {name: torch.cat([keys[name] for keys in every if name in keys]) for name in widths}


# `kt.edit`: requests and a method become an `Edit`; the model is left as it was.


@takes()
@with_bar("solving")
def edit(
    model: TracedModel,
    requests: FactsLike,
    method: MethodLike = "intattn",
    alpha: float | str | None = None,
    **options: Any,
) -> Edit:
    """Solve an edit for all requests in one batch. `EditSession` edits in steps, `run_edits` in a mode and with scores.

    Args:
        model: the loaded model, as `kt.load` returns it. It is left as it was.
        requests: facts with a target (or a foil, which then is the target), one or many; dicts as ROME and MEMIT write
            them; or what `load_facts` reads by name.
        method: a method's name (see `kt ls methods`), or its configuration.
        alpha: attention's share (eq. 13); see `EditSession`.
        options: all other arguments of `EditSession`: statistics, context_templates, preset, variant, seed, corpus,
            history, norm_guard, ..., and hyper-parameters by name.

    Returns:
        The edit, one update a weight. Nothing is written yet; `edit.applied(model)` and `edit.apply_(model)`
        write.

    Raises:
        BadFact: a request without a subject in its prompt, with an empty or unchanged target, or (`strict`) two that
            contradict each other.
        UnknownSite: a layer that the model does not have.
        NotEnoughMemory: the solve's matrices would not fit.
        WorkFailed: the update is zero or not finite.

    Examples:
        >>> edit = kt.edit(model, facts[:2], method="memit", max_tokens=2_000, v_num_grad_steps=5)
        >>> edit.names[0]
        'model.layers.1.mlp.down_proj.weight'
    """
    return EditSession(model, method, alpha, **options).solve(requests)
