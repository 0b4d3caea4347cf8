"""`kt.edit`: requests and a method become an `Edit`; the model is left as it was."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import KtError, WorkFailed
from ..facts.fact import Fact
from ..presets import preset_for
from ..progress import Progress
from ..prompts import template_span
from ..sites import LowRank, Site
from .contexts import Contexts, sample_contexts
from .edit import Edit, fingerprints
from .methods import HyperParameters, Method, default_layers, method_named
from .readings import readings, report
from .recipe import History, Recipe, Setting, Solved, solve
from .statistics import Statistics, key_statistics

if TYPE_CHECKING:
    from ..model import TracedModel


def edit(
    model: TracedModel,
    requests: Sequence[Fact | Mapping[str, Any]],
    method: str = "intattn",
    alpha: float | str | None = None,
    statistics: Statistics | str | Path | None = None,
    context_templates: Sequence[str] | Sequence[Sequence[str]] | None = None,
    preset: str | None = None,
    seed: int = 0,
    corpus: str = "demo",
    max_tokens: int = 100_000,
    progress: Progress | None = None,
    history: History | None = None,
    **hyper_parameters: Any,
) -> Edit:
    """Solve an edit for all requests in one batch.

    Args:
        requests: facts with a target (or a foil, which then is the target), or dicts as ROME and MEMIT write them.
        method: see `kt ls methods`.
        alpha: attention's share (eq. 13): a number, `auto` (traced on the requests' own facts), or None for the
            preset's, and `auto` where there is no preset.
        statistics: second moments by module name; None takes them over `corpus` and caches them.
        context_templates: flat list or list of groups; None lets the model write MEMIT's five prefixes from `seed`.
        history: by weight name, the sum of k kᵀ over keys that earlier edits wrote and this one is to leave alone.
        hyper_parameters: `layers` (or `layers_mlp`), `layers_attn`, `v_lr`, `v_num_grad_steps`, `v_weight_decay`,
            `kl_factor`, `clamp_norm_factor`, `mom2_update_weight`, `mom2_update_weight_attn`, `fact_token`, ...

    Raises:
        BadFact: a request without a subject in its prompt, or with an empty or unchanged target.
        UnknownSite: a layer that the model does not have.
        WorkFailed: the update is zero or not finite.
    """
    facts = _requests(model, requests)
    chosen = method_named(method)
    known = preset_for(model, preset)
    hp = _hyper_parameters(model, known, hyper_parameters, chosen)
    hp = replace(hp, alpha=_alpha(model, facts, alpha, known, chosen.writes_attention, seed))
    recipe = chosen.recipe(hp)
    sites = _sites(recipe)
    contexts = Contexts.of(context_templates) if context_templates else sample_contexts(model, seed)
    statistics = _statistics(model, sites, statistics, corpus, max_tokens, progress)
    solved = solve(Setting(model, statistics, contexts, history or {}), facts, recipe, progress)
    result = _package(model, facts, method, hp, recipe, contexts, statistics, solved, seed)
    result.check()
    _warn_of_weak_targets(facts, solved)
    before = readings(model, facts)
    with result.applied(model):
        after = readings(model, facts)
    result.report = tuple(report(f, b, a) for f, b, a in zip(facts, before, after, strict=True))
    if not all(torch.isfinite(torch.tensor(r.target_prob)).all() for r in result.report):
        raise WorkFailed("the edited model's probabilities are not finite; the edit was not kept")
    return result


def _requests(model: TracedModel, requests: Sequence[Fact | Mapping[str, Any]]) -> list[Fact]:
    from ..facts.formats import read_record

    facts = [
        (r if isinstance(r, Fact) else read_record(dict(r), f"request {i}")).as_request()
        for i, r in enumerate(requests)
    ]
    if not facts:
        raise KtError("no requests to edit; give at least one")
    for fact in facts:
        template_span(model.tokenizer, fact.template, fact.subject)  # fails here, before any work, with its one line
    return facts


def _hyper_parameters(
    model: TracedModel, known: Mapping[str, Any], given: Mapping[str, Any], method: Method
) -> HyperParameters:
    given = {k: v for k, v in given.items() if v is not None}
    if "layers" in given:
        given["layers_mlp"] = given.pop("layers")
    names = {f.name for f in fields(HyperParameters)} - {"alpha"}
    if unknown := sorted(set(given) - names):
        raise KtError(f"hyper-parameter {unknown[0]!r} is unknown; known are {', '.join(sorted(names))}")
    chosen = {k: v for k, v in known.items() if k in names} | dict(method.defaults) | given
    guessed = [name for name in method.needs if not chosen.get(name) and name not in given]
    if guessed:
        chosen |= {name: layers for name, layers in default_layers(model).items() if name in guessed}
        listed = ", ".join(f"{name} {_listed(chosen[name])}" for name in guessed)
        warnings.warn(
            f"no preset and no layers given for {model.name}: writing {listed} by relative depth; "
            "kt alpha proposes layers",
            stacklevel=3,
        )
    for name in ("layers_mlp", "layers_attn", "layers_high"):
        chosen[name] = tuple(sorted({model.checked(int(i)) for i in chosen.get(name, ())}))
        if name in method.needs and name != "layers_attn" and not chosen[name]:
            raise KtError(f"{name} is empty; give at least one layer")
    return HyperParameters(**chosen).checked()


def _alpha(
    model: TracedModel,
    facts: list[Fact],
    alpha: float | str | None,
    known: Mapping[str, Any],
    attention: bool,
    seed: int,
) -> float:
    if not attention:
        if alpha not in (None, 0, 0.0):
            raise KtError(
                f"alpha {alpha!r} was given to a method that leaves attention alone; use intattn, or no alpha"
            )
        return 0.0
    if alpha is None:
        alpha = known.get("alpha", "auto")
    if alpha == "auto":
        return _traced_alpha(model, facts, seed)
    try:
        value = float(alpha)
    except (TypeError, ValueError):
        value = float("nan")
    if not 0 <= value <= 1:
        raise KtError(f"alpha {alpha!r} must be auto or lie between 0 (MLP only) and 1 (attention only)")
    return value


def _traced_alpha(model: TracedModel, facts: list[Fact], seed: int) -> float:
    from ..tracing import balance_factor, causal_trace

    try:
        trace = causal_trace(model, facts, kinds=("mlp", "attn"), seed=seed)
    except KtError as error:
        raise type(error)(f"alpha cannot be traced on these requests ({error}); give it as a number, such as 0.3") from None
    return float(balance_factor(trace, seed=seed).alpha)


def _sites(recipe: Recipe) -> list[Site]:
    """The weights whose second moments the solve will ask for."""
    sites = [s for path in recipe.live if path.solver.needs_moment for s in path.sites]
    if not recipe.live:
        raise KtError(
            "the edit would write nothing: no layers for a module whose share is above zero; check alpha and layers"
        )
    return sites


def _statistics(
    model: TracedModel,
    sites: list[Site],
    given: Statistics | str | Path | None,
    corpus: str,
    max_tokens: int,
    progress: Progress | None,
) -> Statistics:
    if isinstance(given, Statistics):
        return given
    if not sites:
        return Statistics({})
    if given is not None:
        return Statistics.open(given)
    if corpus == "demo" and model.name != "demo":
        warnings.warn(
            "second moments are taken over the small demo corpus, which is not this model's kind of text; "
            "pass statistics= (kt cov --corpus) for results that count",
            stacklevel=3,
        )
    return key_statistics(model, sites, corpus, max_tokens, progress=progress)


def _package(
    model: TracedModel,
    facts: list[Fact],
    method: str,
    hp: HyperParameters,
    recipe: Recipe,
    contexts: Contexts,
    statistics: Statistics,
    solved: Solved,
    seed: int,
) -> Edit:
    from ..environment import versions

    names = {site: model.weight_name(site) for site in solved.written}
    updates = {
        names[s]: LowRank(w.update.left.float().contiguous(), w.update.right.float().contiguous())
        for s, w in solved.written.items()
    }
    manifest = {
        "method": method,
        "alpha": hp.alpha,
        "hyper_parameters": asdict(hp),
        "aims": sorted({str(p.aim) for p in recipe.live}),
        "requests": [_plain(f) for f in facts],
        "model": model.name,
        "revision": model.revision,
        "dtype": str(model.dtype).removeprefix("torch."),
        "fingerprints": fingerprints(model, list(updates)),
        "weight_norms": {n: float(model.weight(s).float().norm()) for s, n in names.items()},
        "conditions": {names[s]: w.condition for s, w in solved.written.items()},
        "context_templates": [list(g) for g in contexts.groups],
        "statistics": {
            "corpus": statistics.corpus,
            "n_tokens": statistics.n_tokens,
            "cache_keys": dict(statistics.hashes),
        },
        "seed": seed,
        "versions": versions(),
    }
    targets = {str(s): t.float().cpu() for s, t in solved.targets.items()}
    keys = {names[s]: w.keys.T.float().cpu().contiguous() for s, w in solved.written.items()}
    return Edit(updates, manifest, targets=targets, keys=keys)


def _warn_of_weak_targets(facts: list[Fact], solved: Solved) -> None:
    for aim, found in solved.search.items():
        weak = [f.subject for f, p in zip(facts, found.prob.tolist(), strict=True) if p < 0.5]
        if weak:
            shown = ", ".join(repr(w) for w in weak[:3])
            warnings.warn(
                f"{len(weak)} of {len(facts)} targets stay below probability 0.5 even with their value put at {aim} "
                f"({shown}); more v_num_grad_steps, a larger v_lr or clamp_norm_factor, or other layers may help",
                stacklevel=3,
            )


def _plain(fact: Fact) -> dict[str, Any]:
    keep = {"id": fact.id, "prompt": fact.template, "subject": fact.subject}
    return keep | {
        "target_new": {"str": fact.target},
        "target_true": {"str": fact.answer} if fact.answer else None,
    }


def _listed(layers: Sequence[int]) -> str:
    return ",".join(map(str, layers)) or "none"
