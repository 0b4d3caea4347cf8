"""Locate-then-edit as a recipe: what is aimed at, where it is written, how the residual spreads.

A *path* takes one target and writes it into one kind of module over a few layers. For each layer, from low to high,
with the layers below already written:

    K = keys of the facts,   R = (wanted value - value now) · spread,   ΔW = solver(R, K, C)        (eq. 6, 7)

and after the solve every ΔW of the path is scaled (eq. 13: 1 - α for the MLP, α for attention). The wanted value is one
target's, or each layer has its own (`Spread`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..._util.progress import Progress
from ...errors import KtError, WorkFailed, warn_user
from ...facts.fact import Fact
from ...model.sites import Kind, Site
from ...model.update import LowRank, Update
from ..config import AUTO
from ..plan import EditHistory, PlanText, SolveContext, SolveResult, WeightUpdate
from .aims import Share, Spread, TargetSite, even
from .auto_ridge import WANTED, layer_share
from .contexts import Contexts
from .keys import fact_keys, fact_values, values_with
from .near_keys import check_keys
from .objective import Alignment, Objective
from .parts import Part, find_in_turn, other_keys, parts_of
from .passes import Again, Missing
from .post_norm import change_of_output, of_own_length, passes_norm
from .sequential import Restoring, holds
from .solvers import ROUNDING, LeastSquares, RankOne, Solution, Solver, System
from .targets import Targets, find_targets, join_targets

if TYPE_CHECKING:
    from ...model.model import TracedModel


SINGULAR = "singular"
"""What `told` has once a solve has warned of a second moment that is all but singular."""
TOO_LARGE = 0.2
"""‖ΔW‖ over ‖W‖ and the root of the facts, above which a write with `largest="auto"` is refused."""


@dataclass(frozen=True)
class Write:
    """One linear map over some layers, written so that `aim` takes its wanted value; `scale` of it is kept.

    `aim` is the last layer's target site; a spread whose layers have targets of their own moves it to each (`aim_at`).
    `kind` names the map: W_o or down_proj by its kind, another one that writes the residual stream by its role.
    """

    kind: Kind | str
    layers: tuple[int, ...]
    aim: TargetSite
    solver: Solver = field(default_factory=LeastSquares)
    scale: Share = 1.0
    spread: Spread = even
    mean_value: bool = False  # R-ROME: the value now is the mean over contexts, as the key is
    largest: float | Literal["auto"] | None = None  # ‖ΔW‖ / √facts that is still written; auto: a fifth of ‖W‖

    @property
    def sites(self) -> tuple[Site, ...]:
        """Those that are written: layers with a share."""
        return tuple(Site(self.kind, layer) for layer, _ in self.shares)

    @property
    def shares(self) -> list[tuple[int, float]]:
        """Each written layer with its share of the residual."""
        count = len(self.layers)
        parts = ((layer, self.spread(index, count)) for index, layer in enumerate(self.layers))
        return [(layer, share) for layer, share in parts if share]

    def aim_at(self, layer: int) -> TargetSite:
        """The target site at another layer."""
        return replace(self.aim, site=Site(self.aim.site.kind, layer, self.aim.site.role))

    @property
    def searched(self) -> list[TargetSite]:
        """Where δ is searched for before anything is written."""
        return [] if self.spread.own else self.aims

    @property
    def aims(self) -> list[TargetSite]:
        """Where δ is searched for."""
        if self.spread.own:
            return [self.aim_at(layer) for layer, _ in self.shares]
        return [self.aim_at(self.layers[0]) if self.spread.replay else self.aim]

    @property
    def as_searched(self) -> Write:
        """The same write, its δ searched for where it is written: each layer's own output gets its share of it."""
        below = () if self.own_targets else tuple(self.shares[:-1])
        return replace(self, aim=replace(self.aim, below=below))

    @property
    def layer_share(self) -> float:
        """The share of every layer's residual that an automatic λ lets through. All layers add up in the residual
        stream; the output of one module gets the write of its own layer only."""
        if self.aim.site.kind is not Kind.RESID or self.own_targets:
            return WANTED
        return layer_share([share for _, share in self.shares])

    @property
    def own_targets(self) -> bool:
        """Whether every layer has a target of its own."""
        return self.spread.own or self.spread.replay


@dataclass(frozen=True)
class LocateThenEdit:
    """Paths, the objective that finds their targets, and how the paths know of each other.

    `joint`: one search over all aims (and over `also`, aims that are searched with the others but not written: PMET's
    attention, the other region in two of JEEP's ablations) instead of one an aim. `coupled`: a path sees what the paths
    before it wrote (scaled); otherwise each is solved on the unedited model, unless norms stand between its
    writes and the stream that it aims at.
    `searched_in_turn`: a path's target is searched for once the paths before it are written.
    `one_by_one`: a whole solve a fact, on the model as the facts before left it (ROME). `again`: several passes over
    the layers. `rewound`: targets are searched for on the weights from before the session. `aligned`: each fact's
    target is searched for once those before it are found, and with what the term makes of theirs (EAMET).
    `window`: longer answers are cut into parts of so many tokens, each with an aim of its own (`parts`).
    """

    paths: tuple[Write, ...]
    objective: Objective = field(default_factory=Objective)
    joint: bool = False
    also: tuple[TargetSite, ...] = ()
    coupled: bool = False
    searched_in_turn: bool = False
    one_by_one: bool = False
    again: Again | None = None
    rewound: bool = False
    aligned: Alignment | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        if self.again and any(path.own_targets for path in self.live):
            raise KtError(f"spread {self.live[0].spread.name} gives each layer its target; passes have one for all")
        alone = [path.spread.name for path in self.live if path.own_targets]
        if alone and self.joint and len(self.live) + len(self.also) > 1:
            raise KtError(
                f"spread {alone[0]} searches for one target after the other, and several are to be searched for "
                "together; give joint_targets=False (JEEP: separate_targets=True, PMET: searched=written)"
            )

    @property
    def live(self) -> list[Write]:
        """The paths that write something."""
        return [p for p in self.paths if p.scale != 0 and p.layers]

    @property
    def moment_sites(self) -> list[Site]:
        return [s for path in self.live if path.solver.needs_moment for s in path.sites]

    @property
    def keeps_keys(self) -> bool:
        return any(path.solver.keeps_keys for path in self.live)

    @property
    def has_targets(self) -> bool:
        return True

    @property
    def whole_blocks(self) -> bool:
        return False

    def describe(self) -> PlanText:
        aims = [aim for path in self.live for aim in path.aims]
        searched = [str(target) for target in dict.fromkeys(aims + list(self.also))]
        together = " together" if self.joint and len(searched) > 1 else ""
        spread = ", ".join(dict.fromkeys(path.spread.name for path in self.live if len(path.layers) > 1))
        order = ["fact by fact"] * self.one_by_one + [f"spread {spread}"] * bool(spread)
        order += ["each write on the ones before"] * self.coupled
        order += ["searched in turn"] * (self.aligned is not None)
        order += [f"up to {self.again.passes} passes"] if self.again else []
        order += [f"answers in parts of {self.window} tokens"] if self.window else []
        return PlanText(
            ", ".join(searched) + together,
            ", ".join(f"{path.kind} ({'one layer' if len(path.layers) == 1 else 'layers'})" for path in self.live),
            "; ".join(dict.fromkeys(path.solver.formula for path in self.live)),
            ", ".join(order) or "–",
        )

    def names(self, model: TracedModel) -> list[str]:
        return [model.weight_name(s) for path in self.live for s in path.sites]

    def require_room(self, model: TracedModel) -> None:
        for path in self.live:
            for site in path.sites:
                path.solver.require_room(model.weight_name(site), [model.key_size(part) for part in model.parts(site)])

    def update_history(self, context: SolveContext, facts: Sequence[Fact]) -> None:
        """Keep the facts' keys as the edited model has them, every layer written (AlphaEdit's cache)."""
        facts = [part.fact for part in parts_of(context.model, facts, self.window)]
        for path in self.live:
            for site in path.sites if path.solver.keeps_keys else ():
                name = context.model.weight_name(site)
                keys = fact_keys(context.model, facts, context.contexts, site, path.aim.position)
                context.state.add_keys(name, keys)
                if path.solver.restores:
                    context.state.add_values(name, _made_of(context.model, name, keys))

    def solve(self, context: SolveContext, facts: Sequence[Fact], progress: Progress | None = None) -> SolveResult:
        """Search, then write layer by layer. The model's weights are the same bytes afterwards, also after an
        exception."""
        if not self.one_by_one:
            return self._solve_batch(context, facts, progress)
        model = context.model
        check_keys(context, facts, self.live, in_turn=True)
        parts: list[SolveResult] = []
        batch = EditHistory()
        with model.restored(self.names(model)):
            for index, fact in enumerate(facts):
                own = replace(context.within(f"fact-{index:05d}"), batch=batch)
                parts.append(self._only(index)._solve_batch(own, [fact], None))
                for name, written in parts[-1].written.items():
                    model.write(name, written.update)
                    for keys in (written.keys, written.also_met):
                        if keys is not None:
                            batch.add_keys(name, keys)
                if progress:
                    progress(index + 1, len(facts))
        return self._result(*_joined(parts))

    def _only(self, index: int) -> LocateThenEdit:
        """The recipe for one of the facts."""
        paths = (replace(p, scale=(p.scale[index],)) if isinstance(p.scale, tuple) else p for p in self.paths)
        return replace(self, paths=tuple(paths))

    def _solve_batch(self, context: SolveContext, facts: Sequence[Fact], progress: Progress | None) -> SolveResult:
        model = context.model
        parts = parts_of(model, facts, self.window)
        facts = [part.fact for part in parts]
        check_keys(context, facts, self.live)
        search = self._search(context, parts, self.live[:1] if self.searched_in_turn else self.live, progress)
        norms = any(path.aim.site.kind is Kind.RESID and passes_norm(model, path.sites[0]) for path in self.live)
        coupled = self.coupled or norms
        written: dict[str, WeightUpdate] = {}
        with ExitStack() as around:
            for number, path in enumerate(self.live):
                if self.searched_in_turn and number:
                    search |= self._search(context.within(f"path-{number}"), parts, [path], progress)
                if coupled:
                    around.enter_context(model.restored(path.sites))
                share: Share = 1.0
                if path.scale != 1 and (norms or passes_norm(model, path.sites[0])):
                    path, share = replace(path, scale=1.0), path.scale
                with ExitStack() if coupled else model.restored(path.sites):
                    solved = self._walks(context.within(f"path-{number}"), parts, path, search, share)
                scaled = {n: w._replace(update=_scaled(w.update, path.scale)) for n, w in solved.items()}
                if coupled and path.scale != 1:
                    for name, full in solved.items():  # from full strength to the path's scale, for the paths after it
                        model.write(name, scaled[name].update.plus(full.update.scaled(-1.0)))
                _add(written, scaled)
        return self._result(written, search)._replace(asked=facts if self.window else None)

    def _walks(
        self,
        context: SolveContext,
        parts: Sequence[Part],
        path: Write,
        search: dict[TargetSite, Targets],
        share: Share,
    ) -> dict[str, WeightUpdate]:
        """One walk over the layers, or several, each for the facts that still miss their targets."""
        if self.again is None:
            return self._walk(context, parts, path, search, share)
        facts = [part.fact for part in parts]
        aim, targets = path.aim, search[path.aim]
        guarded = context.guard is not None
        missing = Missing(self.again, targets.wanted[aim], targets.before[aim], guarded)
        solved: dict[str, WeightUpdate] = {}
        done: set[int] = set()
        for number in range(self.again.passes):
            now = fact_values(context.model, facts, Contexts(), aim.site, aim.position).T
            if not (chosen := missing.chosen(now)):
                break
            some = {aim: search[aim].of(chosen)}
            new = self._walk(context.within(f"pass-{number}"), [parts[i] for i in chosen], path, some, share)
            fresh = [column for column, fact in enumerate(chosen) if fact not in done]
            for name, update in new.items():
                assert update.keys is not None
                _add(solved, {name: update._replace(keys=update.keys[:, fresh])})
            done |= set(chosen)
        if not solved:
            raise missing.nothing()
        return solved

    def _walk(
        self,
        context: SolveContext,
        parts: Sequence[Part],
        path: Write,
        search: dict[TargetSite, Targets],
        share: Share,
    ) -> dict[str, WeightUpdate]:
        """Solve and write layer by layer, each a phase; keys and residuals are read again after a write, as MEMIT does.

        Args:
            search: the searches so far; those that the path makes itself join them.
            share: what the path is to make of the wanted change, where its update cannot be scaled after the solve.
        """
        facts = [part.fact for part in parts]
        if path.spread.replay:
            search |= _replayed(context, facts, path, search[path.searched[0]])
        wanted: dict[TargetSite, Float[Tensor, "fact d_model"]] = {}
        solved: dict[str, WeightUpdate] = {}
        for layer, part in path.shares:
            site, aim = Site(path.kind, layer), path.aim_at(layer) if path.own_targets else path.aim
            if path.spread.own:
                search |= self._find(context, parts, [aim])
            if aim not in wanted:
                wanted[aim] = _shared(context, facts, aim, search[aim].wanted[aim], share)
            name = context.model.weight_name(site)
            if isinstance(path.solver, Restoring):  # not within the phase: a resumed run counts it, too
                moment, memory = context.moment(name, context.model.key_size(site)), context.state.running
                changed, weight = context.changes().get(name), context.model.weight(name)
                memory[name] = path.solver.remembered(memory.get(name), changed, moment, weight)
            given = context, parts, replace(path, aim=aim), wanted[aim], site, part, self.window is not None
            solved[name] = WeightUpdate.of(context.journal.take(_phase(context.model, path, site), _solve_site, *given))
            if path.solver.automatic and solved[name].chosen is None:
                raise KtError(
                    f"this run was begun when λ and the ridges had fixed defaults (of {name} none is kept); begin it "
                    "anew, or resume it with the kt that began it"
                )
            context.model.write(site, solved[name].update)
        return solved

    def _result(self, written: dict[str, WeightUpdate], search: dict[TargetSite, Targets]) -> SolveResult:
        notes = {}
        if self.objective.lr == AUTO:
            rates = {str(aim): self.objective.rates(aim, targets.before[aim]) for aim, targets in search.items()}
            notes["v_lr"] = {aim: float(rate.median()) for aim, rate in rates.items()}
        return SolveResult(written, {a: t.wanted[a] for a, t in search.items()}, search, notes)

    def _search(
        self, context: SolveContext, parts: Sequence[Part], paths: Sequence[Write], progress: Progress | None
    ) -> dict[TargetSite, Targets]:
        aims = list(dict.fromkeys([aim for path in paths for aim in path.searched] + list(self.also)))
        targets_by_site: dict[TargetSite, Targets] = {}
        for group in [aims] if self.joint and aims else [[a] for a in aims]:
            targets_by_site |= self._find(context, parts, group, progress)
        return targets_by_site

    def _find(
        self, context: SolveContext, parts: Sequence[Part], aims: list[TargetSite], progress: Progress | None = None
    ) -> dict[TargetSite, Targets]:
        """One search, on the model as it stands, its wanted values as the session's norm guard leaves them."""
        facts = [part.fact for part in parts]
        with context.unedited() if self.rewound else nullcontext():
            given = (aims, context.contexts, self.objective)
            kept: dict[str, Any] = {"progress": progress, "journal": context.journal}
            if self.window is not None:
                targets = find_in_turn(context.model, parts, aims[0], context.contexts, self.objective, **kept)
            elif self.aligned is not None:
                targets = self._in_turn(context, facts, aims, self.aligned, progress)
            else:
                targets = find_targets(context.model, facts, *given, **kept)
            if context.guard is not None:
                modules = {aim: path.kind for path in self.live for aim in path.aims}
                targets = context.guard(context, facts, targets, self.objective, modules)
        return dict.fromkeys(aims, targets)

    def _in_turn(
        self,
        context: SolveContext,
        facts: Sequence[Fact],
        aims: list[TargetSite],
        aligned: Alignment,
        progress: Progress | None,
    ) -> Targets:
        """A search a fact, each knowing the δ of those before it."""
        aim = aims[0]
        site = Site(next(path.kind for path in self.live), aim.site.layer)
        keys = fact_keys(context.model, facts, context.contexts, site, aim.position)
        parts: list[Targets] = []
        deltas = keys.new_zeros((0, context.model.d_model))
        for number, fact in enumerate(facts):
            term = aligned.term(keys[:, : number + 1], deltas)
            objective = replace(self.objective, terms=(*self.objective.terms, term))
            journal = context.journal.within(f"turn-{number:05d}")
            parts.append(find_targets(context.model, [fact], [aim], context.contexts, objective, journal=journal))
            deltas = torch.cat([deltas, (parts[-1].wanted[aim] - parts[-1].before[aim]).to(deltas)])
            if progress:
                progress(number + 1, len(facts))
        return join_targets(parts)


def _replayed(context: SolveContext, facts: Sequence[Fact], path: Write, first: Targets) -> dict[TargetSite, Targets]:
    """Every layer's target: what stands there once the first layer's value is put in place (Forward Replay)."""
    aims = [path.aim_at(layer) for layer, _ in path.shares]
    model, wanted = context.model, first.wanted[aims[0]]
    sites, position = [aim.site for aim in aims], path.aim.position
    before = values_with(model, facts, sites, position)
    after = values_with(model, facts, sites, position, wanted)
    return {
        aim: first._replace(wanted={aim: wanted if aim == aims[0] else new.to(wanted)}, before={aim: old.to(wanted)})
        for aim, old, new in zip(aims, before, after, strict=True)
    }


def _shared(
    context: SolveContext, facts: Sequence[Fact], aim: TargetSite, wanted: Float[Tensor, "fact d_model"], share: Share
) -> Float[Tensor, "fact d_model"]:
    """A share of the way to the wanted values, from the values as they stand.

    What an output adds to the residual stream is linear in it, and its update can be scaled after the solve, unless a
    norm stands between.
    """
    if share == 1:
        return wanted
    now = fact_values(context.model, facts, Contexts(), aim.site, aim.position).T
    return now + torch.tensor(share, dtype=now.dtype, device=now.device).reshape(-1, 1) * (wanted - now)


def _solve_site(
    context: SolveContext,
    parts: Sequence[Part],
    path: Write,
    wanted: Float[Tensor, "fact d_model"],
    site: Site,
    share: float,
    hold_others: bool = False,
) -> dict[str, Any]:
    """One weight's update, in full strength, on the model as the layers before left it; as a journal keeps it."""
    model, contexts, bare = context.model, context.contexts, Contexts()
    facts = [part.fact for part in parts]
    name = model.weight_name(site)
    keys = fact_keys(model, facts, contexts, site, path.aim.position).cpu()
    now = fact_values(model, facts, contexts if path.mean_value else bare, path.aim.site, path.aim.position)
    residuals = wanted.T.double() - now
    change = residuals * share
    if path.aim.site.kind is Kind.RESID and not model.layout.direct:
        output = fact_values(model, facts, bare, site, path.aim.position)
        change = change_of_output(model, site, output, change).output
    elif path.aim.site.kind is not Kind.RESID and passes_norm(model, site):
        templates = contexts if path.mean_value else bare
        output = now if site == path.aim.site else fact_values(model, facts, templates, site, path.aim.position)
        change = of_own_length(model, site, output, change)
    past = _past(context, name, path.solver)
    if hold_others:
        others = other_keys(model, parts, site)
        past = others if past is None else torch.cat([past, others], 1)
    system = System(
        change.cpu(),
        keys,
        fact_keys(model, facts, bare, site, path.aim.position).cpu() if path.solver.needs_bare else None,
        context.moment(name, len(keys)) if path.solver.needs_moment else None,
        past,
        path.layer_share,
        requests=tuple(fact.prompt for fact in facts),
        rounding=max(ROUNDING, 4 * torch.finfo(model.dtype).eps),  # of a few roundings in a forward
    )
    if path.solver.restores:
        system = _with_changes(context, name, system)
    solution = path.solver(system)
    _check(context, name, system, solution)
    if path.largest is not None:
        _check_size(model, name, solution, path.largest, len(facts))
    chosen = solution.chosen and solution.chosen.as_dict()
    return WeightUpdate(
        solution.update, solution.condition, keys, float(residuals.norm()), chosen, solution.also_met
    ).as_dict()


def _phase(model: TracedModel, path: Write, site: Site) -> str:
    """The name under which a journal keeps a weight's solve: what an older kt solved otherwise is solved anew."""
    name = model.weight_name(site)
    if path.aim.site.kind is not Kind.RESID and passes_norm(model, site):
        name += "-own-length"
    return name + "-both-keys" * (isinstance(path.solver, RankOne) and path.solver.key_cosine > 0)


def _past(context: SolveContext, name: str, solver: Solver) -> Float[Tensor, "d_in past"] | None:
    """Keys that the solve is to leave alone: of earlier edits, or of the facts before this one."""
    if solver.holds_batch:
        return context.batch.keys.get(name)
    return context.state.keys.get(name) if solver.keeps_keys else None


def _with_changes(context: SolveContext, name: str, system: System) -> System:
    """The system with what the session's edits changed. Keys of before the session have the values of its beginning."""
    change, values = context.changes().get(name), context.state.values.get(name)
    missed = None
    if system.past is not None:
        early = system.past.shape[1] - (0 if values is None else values.shape[1])
        given_now = _made_of(context.model, name, system.past)
        if change is None:
            before = given_now[:, :early]
        else:
            before = given_now[:, :early] - change.dense() @ system.past[:, :early]
        missed = (before if values is None else torch.cat([before, values], 1)) - given_now
    queue = context.state.running[name]["queue"]
    return system._replace(change=change, past_residuals=missed, queue=queue)


def _made_of(model: TracedModel, name: str, keys: Float[Tensor, "d_in n"]) -> Float[Tensor, "d_out n"]:
    """W K, float64 on the CPU."""
    return model.weight(name).detach().double().cpu() @ keys.double().cpu()


def _check(context: SolveContext, name: str, system: System, solution: Solution) -> None:
    """Refuse an update that is not finite. What there is to warn of is said at the first weight, or the first one that
    leaves a request alone."""
    if not solution.update.finite:
        raise WorkFailed(f"the update of {name} is not finite; check targets and statistics")
    if new := [fact for fact in solution.held if system.requests[fact] not in context.told]:
        context.told.update(system.requests[fact] for fact in new)
        warn_user(f"{holds(system, new, name)}: left as it is; alphaedit would change it")
    if (solution.ridge or solution.condition > 1e14) and SINGULAR not in context.told:
        context.told.add(SINGULAR)
        warn_user(
            f"{name}: the second moment is all but singular (condition number {solution.condition:.0e}, "
            f"ridge {solution.ridge:g}); take it over more tokens or raise mom2_update_weight"
        )


def _check_size(
    model: TracedModel, name: str, solution: Solution, largest: float | Literal["auto"], count: int
) -> None:
    """Refuse an update that is so large that the model would be damaged.

    Raises:
        WorkFailed: it is.
    """
    if largest == "auto":
        largest = TOO_LARGE * float(model.weight(name).double().norm())
    size = solution.update.norm() / count**0.5
    if size > largest:
        raise WorkFailed(
            f"{name}: ‖ΔW‖ over the root of the requests is {size:.3g}, above stop_norm {largest:.3g}: the model would "
            "be damaged; end the run here, or raise stop_norm"
        )


def _joined(parts: Sequence[SolveResult]) -> tuple[dict[str, WeightUpdate], dict[TargetSite, Targets]]:
    """Solves of one fact after the other as one: updates added up, searches side by side."""
    written: dict[str, WeightUpdate] = {}
    for part in parts:
        _add(written, part.written)
    aims = dict.fromkeys(aim for part in parts for aim in part.search)
    return written, {aim: join_targets([p.search[aim] for p in parts if aim in p.search]) for aim in aims}


def _add(written: dict[str, WeightUpdate], more: Mapping[str, WeightUpdate]) -> None:
    """Add updates to those that are there already."""
    for name, update in more.items():
        written[name] = _sum(written[name], update) if name in written else update


def _sum(old: WeightUpdate, new: WeightUpdate) -> WeightUpdate:
    assert old.keys is not None and new.keys is not None
    return WeightUpdate(
        old.update.plus(new.update),
        max(old.condition or 0, new.condition or 0),
        torch.cat([old.keys, new.keys], 1),
        ((old.residual_norm or 0) ** 2 + (new.residual_norm or 0) ** 2) ** 0.5,
        new.chosen or old.chosen,
    )


def _scaled(update: Update, scale: Share) -> Update:
    if not isinstance(scale, tuple):
        return update.scaled(scale)
    assert isinstance(update, LowRank), "a closed form gives one column a fact"
    return update.scaled(torch.tensor(scale, dtype=update.left.dtype))
