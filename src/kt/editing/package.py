"""A solve's result as an `Edit`: updates in float32, where they came from, and how much of what was wanted arrived."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .._util.text import count, without_folders
from ..errors import WorkFailed, warn_user
from ..facts.fact import Fact
from ..model.identity import about
from ..model.mixture import slice_of
from ..model.sites import Kind, Site
from ..model.update import Update
from ..stats import bootstrap_mean
from .apply import fingerprints
from .closed_form.contexts import Contexts
from .closed_form.keys import fact_values
from .closed_form.post_norm import added, passes_norm
from .config import Config
from .edit import Edit
from .plan import Plan, SolveContext, SolveResult, WeightUpdate
from .request_report import LOG_PROBS
from .rounding import Reading, about_log_probs, about_rounding, is_narrow, readings, report, warn_of_rounding
from .verdict import Knobs, TextReading, about_side_effects, side_effects

if TYPE_CHECKING:
    from ..model.model import TracedModel


def package(
    context: SolveContext,
    facts: Sequence[Fact],
    config: Config,
    plan: Plan,
    solved: SolveResult,
    check: bool = True,
    text: TextReading | None = None,
) -> Edit:
    """The edit with its manifest, read back from the model while it is written in; `check` and `text`: `read_back`."""
    model, alpha = context.model, getattr(config, "alpha", None)
    written = by_parameter(model, solved.written)
    updates = {name: each.update.to(torch.float32) for name, each in written.items()}
    manifest = {
        "method": config.name,
        "alpha": config.mean_alpha,
        "alphas": list(alpha) if isinstance(alpha, tuple) else None,
        "hyper_parameters": config.as_dict(),
        "aims": sorted(map(str, solved.targets)),
        "written_aims": sorted({str(path.aim) for path in getattr(plan, "live", ())}),
        "conditions": {n: w.condition for n, w in written.items() if w.condition is not None},
        "context_templates": [list(g) for g in context.contexts.groups],
        "statistics": about_statistics(context, plan, solved),
        "norm_guard": False if context.guard is None else context.guard.name,
        "past_keys": max((k.shape[1] for k in context.state.keys.values()), default=0) if plan.keeps_keys else 0,
        "seed": context.seed,
        **solved.notes,
        **({} if context.guard is None else context.guard.notes),
    }
    if chosen := {n: w.chosen for n, w in written.items() if w.chosen is not None}:
        manifest["chosen"] = chosen
    edit = Edit(
        updates,
        about_weights(model, updates) | about_requests(facts) | manifest,
        targets={str(aim): t.float().cpu() for aim, t in solved.targets.items()},
        keys={n: w.keys.T.float().cpu().contiguous() for n, w in written.items() if w.keys is not None},
        effect=solved.effect,
    )
    if context.guard is not None:
        context.guard.tell(len(facts))
    if len(manifest.get("skipped", ())) < len(facts):  # where a norm guard leaves all of them alone, zero is right
        edit.check()
    warn_of_weak_targets(facts, solved)
    read_back(model, edit, facts, readings(model, list(facts), unedited=True), solved, check, text)
    _warn_of_weak_writes(edit)
    return edit


def by_parameter(model: TracedModel, solved: Mapping[str, WeightUpdate]) -> dict[str, WeightUpdate]:
    """What was solved, by the parameters (of experts: their slices) that it changes."""
    found: dict[str, WeightUpdate] = {}
    for name, whole in solved.items():
        parts = model.by_part(name, whole.update)
        if list(parts) == [name]:
            found[name] = whole
            continue
        columns = {}
        if whole.keys is not None:
            columns = {model.weight_name(part): at for part, at in model.parts(model.site_of(name)).items()}
        for part, update in parts.items():
            keys = None if whole.keys is None else whole.keys[columns[part]]
            found[part] = whole._replace(update=update, keys=keys)
    return found


def about_statistics(context: SolveContext, plan: Plan, solved: SolveResult) -> dict[str, Any]:
    """Which second moments the solve used: by module, the SHA-256 of the matrix's bytes as stored."""
    moments = context.statistics
    written = [name for name in map(context.model.weight_name, plan.moment_sites) if name in solved.written]
    used = [part for name in written for part in context.model.weight_names(name)]
    return {
        "corpus": moments.corpus,
        "n_tokens": moments.n_tokens,
        "cache_keys": dict(moments.hashes),
        "sha256": {name.removesuffix(".weight"): moments.moment_of(name).sha256() for name in used},
    }


def about_weights(model: TracedModel, updates: dict[str, Update]) -> dict[str, Any]:
    """Which model's weights these are, and their norms, before the edit.

    `model` is the name as it was typed; of an absolute path only the last part, for a file that is handed on says
    nothing of the machine where it was made.
    """
    from ..runs.provenance import versions

    stored = {name: f"{how}" for name in updates if (how := model.dequantised.get(slice_of(name)[0])) is not None}
    packed = model.packing(updates)
    return {
        **({"dequantised": stored} if stored else {}),
        **({"packed": packed} if packed else {}),
        "model": without_folders(model.name),
        "revision": model.revision,
        "dtype": str(model.dtype).removeprefix("torch."),
        "fingerprints": fingerprints(model, list(updates)),
        "identity": about(model),
        **({"chat": model.chat.frame.as_dict()} if model.chat is not None else {}),
        "weight_norms": {name: float(model.weight(name).float().norm()) for name in updates},
        "attention_weights": [n for n in updates if _is_attention(model, n)],
        "versions": versions(),
    }


def about_requests(facts: Sequence[Fact]) -> dict[str, Any]:
    return {"requests": [_plain(fact) for fact in facts]}


def read_back(
    model: TracedModel,
    edit: Edit,
    facts: Sequence[Fact],
    before: list[Reading],
    solved: SolveResult | None = None,
    check: bool = True,
    text: TextReading | None = None,
) -> None:
    """Write the edit in for a moment: what the requests say now, what its control says, how much of each wanted value
    came through, what rounding left, and how the weights' norms and fingerprints changed.

    Args:
        check: also read neighbours and perplexity, and warn of what the verdict found.
        text: perplexity before the edit, if it is known.
    """
    beside = side_effects(model, facts, text) if check else None
    before_narrow = {name: weight.clone() for name in edit.names if is_narrow(weight := model.own(name).detach())}
    with edit.applied(model):
        after = readings(model, list(facts))
        edit.manifest["fingerprints_after"] = fingerprints(model, edit.names)
        edit.manifest |= about_rounding(model, edit, before_narrow, facts)
        now = {name: float(model.weight(name).float().norm()) for name in edit.names}
        old = edit.manifest["weight_norms"]
        edit.manifest["norm_ratios"] = {n: v / old[n] for n, v in now.items() if old[n]}  # Gemma's gains begin at zero
        if solved is not None:
            edit.manifest["value_change"] = value_change(model, facts, solved)
        if beside is not None:
            edit.manifest |= about_side_effects(beside, side_effects(model, facts))
    control = edit.control()
    under_control: list[Reading] | None = None
    if control is not None:
        with control.applied(model):
            under_control = readings(model, list(facts))
    control_readings: list[Reading | None] = [*under_control] if under_control else [None] * len(facts)
    edit.manifest.pop(LOG_PROBS, None)
    if (log_probs := about_log_probs(before, after)) is not None:
        edit.manifest[LOG_PROBS] = log_probs
    edit.report = tuple(report(f, b, a, c) for f, b, a, c in zip(facts, before, after, control_readings, strict=True))
    if not all(torch.isfinite(torch.tensor(r.target_prob)).all() for r in edit.report):
        raise WorkFailed("the edited model's probabilities are not finite; the edit was not kept")
    warn_of_rounding(edit, model.dtype)
    if check and (verdict := edit.verdict) is not None:
        verdict.warn()


def value_change(model: TracedModel, facts: Sequence[Fact], solved: SolveResult) -> dict[str, Any]:
    """By aim, over facts: `came_through`, the change's length along the wanted one (1: all of it), and `left`, what is
    still missing, relative to what was wanted. Read on the bare prompts with the edit, scaled as it is, written in; of
    a module's own output before a norm, which takes no notice of its length, what the norm makes of it. A request for
    which nothing was to change has neither."""
    changes = {}
    for aim, search in solved.search.items():
        before, wanted = search.before[aim].double().cpu(), search.wanted[aim].double().cpu()
        now = fact_values(model, solved.asked or facts, Contexts(), aim.site, aim.position).T.cpu()
        if aim.site.kind is not Kind.RESID and passes_norm(model, aim.site):
            before, wanted, now = (added(model, aim.site, value.T).T for value in (before, wanted, now))
        wanted_change = wanted - before
        length = wanted_change.norm(dim=-1)
        nonzero = length > 0
        through = (((now - before) * wanted_change).sum(-1) / length**2)[nonzero]
        left = ((wanted - now).norm(dim=-1) / length)[nonzero]
        changes[str(aim)] = {
            "came_through": bootstrap_mean(through.tolist()).as_dict(),
            "left": bootstrap_mean(left.tolist()).as_dict(),
        }
    return changes


def warn_of_weak_targets(facts: Sequence[Fact], solved: SolveResult) -> None:
    """One line for all sites, of the one where most stay low: a method may search at every layer that it writes."""
    facts = solved.asked or facts
    found = {}
    for aim, targets in solved.search.items():
        weak = [f.subject for f, p in zip(facts, targets.prob.tolist(), strict=True) if p < 0.5]
        if weak:
            found[aim] = weak
    if found:
        aim = max(found, key=lambda aim: len(found[aim]))
        weak, others = found[aim], f" (and some at {count(len(found) - 1, 'other site')})" * (len(found) > 1)
        shown = ", ".join(repr(w) for w in weak[:3])
        warn_user(
            f"{len(weak)} of {len(facts)} targets stay below probability 0.5 even with their value put at {aim}"
            f"{others} ({shown}); more v_num_grad_steps, a larger v_lr or clamp_norm_factor, or other layers may help"
        )


def _warn_of_weak_writes(edit: Edit) -> None:
    """λ is in units of keys: what holds a 7B model back moves a small one not at all."""
    means = [change["came_through"] for change in edit.manifest["value_change"].values()]
    through = [mean["mean"] for mean in means if mean["n"]]
    if through and max(through) < 0.1:
        hint = Knobs.of(str(edit.manifest["method"])).free
        warn_user(f"only {max(through):.0%} of the wanted change came through the write; {hint}")


def _is_attention(model: TracedModel, name: str) -> bool:
    return name in [model.weight_name(Site(Kind.ATTN, layer)) for layer in model.layers_with(Kind.ATTN)]


def _plain(fact: Fact) -> dict[str, Any]:
    keep = {"id": fact.id, "prompt": fact.template, "subject": fact.subject}
    return (
        keep
        | ({"relation": fact.relation} if fact.relation else {})
        | ({} if fact.target_prefix is None else {"target_prefix": fact.target_prefix})
        | {
            "target_new": {"str": fact.target},
            "target_true": {"str": fact.answer} if fact.answer else None,
        }
    )
