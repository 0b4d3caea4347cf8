"""Edits of one model for many settings; second moments, contexts and paths are computed once.

Second moments (with their factors) and context templates are shared by all settings. Where a joint edit's two paths
do not see each other (`coupled` and `joint_targets` off, the default), α only scales them (eq. 13): each path is
solved once in full strength, and every α is a rescaling of the two.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._util.data import to_json
from .._util.progress import Progress
from ..editing import Edit, Statistics
from ..editing.closed_form.plan import LocateThenEdit
from ..editing.config import Config
from ..editing.edit import OF_THE_WHOLE
from ..editing.plan import Plan, reads_contexts
from ..editing.resolve import configure, resolve, take_statistics
from ..editing.session import edit
from ..facts.fact import Fact
from ..runs.journal import Journal

if TYPE_CHECKING:
    from ..model.model import TracedModel
    from ..model.update import Update


OF_ATTENTION = ("layers_attn", "attn_aim", "mom2_update_weight_attn")
OF_MLP = ("layers", "layers_mlp")
"""Settings of one path, which the other's solve does not depend on."""

OF_THE_SESSION = ("context_templates", "history", "keep_history", "norm_guard", "norm_facts", "update_guard",
                  "alpha_facts", "statistics")  # fmt: skip
"""Arguments of `kt.edit` that are no part of a method's configuration."""


class Solver:
    """Edits of `model` for the settings of a sweep.

    Args:
        settings: the options of every point to come.
        statistics, corpus, max_tokens: second moments, as in `kt.edit`.
        journal: keeps phases that several settings share (`SharedTargets`).
    """

    def __init__(
        self,
        model: TracedModel,
        settings: Sequence[Mapping[str, Any]],
        statistics: Statistics | str | Path | None = None,
        corpus: str = "auto",
        max_tokens: int | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.model, self.corpus, self.max_tokens, self.journal = model, corpus, max_tokens, journal
        self._plans = {to_json(options): self._plan(options) for options in settings}
        plans = [plan for plan in self._plans.values() if plan is not None]
        self._sites = sorted({site for plan in plans for site in plan.moment_sites})
        self._all_known = len(plans) == len(self._plans)
        self._statistics: Statistics | str | Path | None = statistics
        self._given = statistics is not None
        self._contexts: dict[tuple[Any, int], Sequence[Sequence[str]]] = {}
        self._paths: dict[str, Edit] = {}

    def edit(self, facts: Sequence[Fact], options: Mapping[str, Any], seed: int, progress: Progress | None) -> Edit:
        """The edit of these facts with these options."""
        plan = self._plans.get(to_json(options)) or self._plan(options)
        alpha = options.get("alpha")
        if not separable(plan) or not isinstance(alpha, int | float):
            return self.solve(facts, options, seed, progress)
        wanted = {"mlp": 0.0} if alpha == 0 else {"attn": 1.0} if alpha == 1 else {"mlp": 0.0, "attn": 1.0}
        parts = {}
        for path, share in wanted.items():
            foreign = OF_ATTENTION if path == "mlp" else OF_MLP
            settings = {name: value for name, value in options.items() if name not in (*foreign, "alpha")}
            key = to_json({"path": path, "options": settings, "facts": [fact.id for fact in facts], "seed": seed})
            if key not in self._paths:
                self._paths[key] = self.solve(facts, {**options, "alpha": share}, seed, progress)
            parts[path] = self._paths[key]
        return parts.popitem()[1] if len(parts) == 1 else combined(parts["mlp"], parts["attn"], float(alpha))

    def solve(self, facts: Sequence[Fact], options: Mapping[str, Any], seed: int, progress: Progress | None) -> Edit:
        """The edit, solved as a whole whatever was solved before: what it costs is its own."""
        shared = self.arguments(options, seed, progress) | {"journal": self.journal}
        return edit(self.model, facts, **(shared | dict(options)))

    def arguments(self, options: Mapping[str, Any], seed: int, progress: Progress | None) -> dict[str, Any]:
        """The arguments of `kt.edit` that all settings share, without those of the sweep's own that this method would
        say are without effect."""
        plan = self._plans.get(to_json(options))
        reads = plan is None or reads_contexts(plan)
        counts = plan is None or bool(plan.moment_sites) or self._given
        return {
            **({"context_templates": self._templates(options, seed)} if reads else {}),
            **({"statistics": self._moments(progress)} if counts else {}),
            "corpus": self.corpus,
            "max_tokens": self.max_tokens,
            "seed": seed,
            "progress": progress,
            "check": False,  # a sweep measures bad settings on purpose
        }

    def _plan(self, options: Mapping[str, Any]) -> Plan | None:
        """The plan of an edit with these options; None if it depends on a trace or a probe still to come."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the solve itself says it once more
            config = config_of(self.model, options)
            config.require(self.model)
            return None if config.needs_evidence else resolve(config, self.model, [])[0].plan()

    def _moments(self, progress: Progress | None) -> Statistics | str | Path | None:
        """One object for all points, if their needs are known, so that its factors are computed once."""
        if self._all_known and not isinstance(self._statistics, Statistics):
            given = self._statistics
            more = (self.corpus, self.max_tokens, progress)
            self._statistics = take_statistics(self.model, self._sites, given, *more)
        return self._statistics

    def _templates(self, options: Mapping[str, Any], seed: int) -> Sequence[Sequence[str]]:
        """The prefixes that the model writes for a method, once a seed."""
        from ..editing.methods import method_named

        write = method_named(options.get("method", "intattn")).contexts
        if (write, seed) not in self._contexts:
            self._contexts[write, seed] = [list(group) for group in write(self.model, seed).groups]
        return self._contexts[write, seed]


def config_of(model: TracedModel, options: Mapping[str, Any]) -> Config:
    """The configuration of a point's options."""
    return configure(model, **{name: value for name, value in options.items() if name not in OF_THE_SESSION})


def separable(plan: Plan | None) -> bool:
    """Whether α only scales what is solved: the paths do not see each other's writes, nor share a search."""
    return (
        isinstance(plan, LocateThenEdit)
        and not (plan.joint or plan.coupled or plan.one_by_one)
        and len({path.kind for path in plan.paths}) == len(plan.paths)
    )


def combined(mlp: Edit, attn: Edit, alpha: float) -> Edit:
    """(1 - α) of an edit of the MLP and α of one of attention, both in full strength (eq. 13)."""
    updates: dict[str, Update] = {name: update.scaled(1 - alpha) for name, update in mlp.updates.items()}
    updates |= {name: update.scaled(alpha) for name, update in attn.updates.items()}
    manifest = {n: v for n, v in mlp.manifest.items() if n not in OF_THE_WHOLE} | {"alpha": alpha}
    for name in ("fingerprints", "weight_norms"):
        manifest[name] = {**mlp.manifest[name], **attn.manifest[name]}
    manifest["attention_weights"] = [*mlp.manifest["attention_weights"], *attn.manifest["attention_weights"]]
    if chosen := mlp.manifest.get("chosen", {}) | attn.manifest.get("chosen", {}):
        manifest["chosen"] = chosen
    whole = Edit(updates, manifest)
    whole.check()
    return whole
