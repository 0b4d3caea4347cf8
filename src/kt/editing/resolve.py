"""The inputs of a solve from a user's: requests, a configuration with all layers and α, second moments.

`configure` makes a method's configuration of the user's values and the preset's; `resolve` fills in what neither gives,
and is the only part of editing that traces or probes.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._util.progress import Progress
from ..errors import BadFact, KtError
from ..facts.fact import Fact
from ..facts.load import facts_from
from ..model.sites import Site
from ..model.tokens import template_span
from .closed_form.config import check_alpha
from .closed_form.second_moment import Statistics, key_statistics
from .config import Config, check_value
from .methods import method_named, setting_types
from .presets import preset_for

if TYPE_CHECKING:
    from ..model.model import TracedModel
    from ..probing import Stages
    from ..runs.journal import Journal
    from ..tracing import Balance


MOST_TRACED = 100
"""Facts that a trace for α takes at most, evenly: its interval shrinks with their root, its time grows with them."""


def read_requests(model: TracedModel, requests: Sequence[Fact | Mapping[str, Any]]) -> list[Fact]:
    """Facts with a target each.

    Raises:
        BadFact: a target is empty or the old answer, or two requests contradict each other.
        SubjectNotFound: a subject is not in its prompt.
    """
    facts = [fact.as_request() for fact in facts_from(requests)]
    if not facts:
        raise KtError("no requests to edit; give at least one")
    for fact in facts:
        template_span(model.tokenizer, fact.template, fact.subject)  # fails here, before any work, with its one line
    return facts


def refuse_contradictions(facts: Sequence[Fact]) -> None:
    """Two targets for one prompt cannot both be written; one prompt and target twice would count twice."""
    seen: dict[str, tuple[int, Fact]] = {}
    for number, fact in enumerate(facts, start=1):
        prompt = " ".join(fact.prompt.split()).casefold()
        earlier, other = seen.setdefault(prompt, (number, fact))
        if earlier == number:
            continue
        if other.target != fact.target:
            raise BadFact(
                f"requests {earlier} and {number} contradict each other: {fact.prompt!r} is to become "
                f"{other.target!r} and {fact.target!r}; keep one of them (or edit them in sequence)"
            )
        raise BadFact(f"requests {earlier} and {number} are the same ({fact.prompt!r}); keep one of them")
    same = defaultdict(list)
    for fact in facts:
        if fact.relation:
            same[fact.subject.casefold(), fact.relation].append(fact)
    for group in same.values():
        if len({f.target for f in group}) > 1:
            warnings.warn(
                f"{len(group)} requests give {group[0].subject!r} different targets of one relation "
                f"({group[0].target!r}, {group[1].target!r}); they may undo each other",
                stacklevel=4,
            )


def configure(
    model: TracedModel,
    method: str = "intattn",
    alpha: float | str | None = None,
    preset: str | None = None,
    variant: str | None = None,
    **given: Any,
) -> Config:
    """A method's configuration: the preset's shared values, then the method's own defaults, then the preset's values
    for this method, then the user's.

    Args:
        alpha: attention's share; None takes the preset's, and `auto` where there is none.
        preset: hyper-parameters by name, or a TOML file; None finds the one that matches the model.
        variant: the preset's values for one data set.
        given: hyper-parameters by name; None counts as not given, and those of other methods have no effect.

    Returns:
        The configuration. Layers that nobody gave, and an α that is to be traced, are left to `resolve`.

    Raises:
        KtError: an unknown method, preset, variant or name, or a value of the wrong type, sign or range.
    """
    chosen, known = method_named(method), preset_for(model, preset)
    if variant is not None and known is None:
        raise KtError(f"no preset matches {model.name}, so there is no variant {variant!r}; give --preset")
    given = _renamed(given)
    types = setting_types()
    if unknown := sorted(set(given) - (set(types) - {"alpha"})):
        names = ", ".join(sorted(set(types) - {"alpha"}))
        raise KtError(f"hyper-parameter {unknown[0]!r} is unknown; known are {names}")
    for name, value in given.items():
        check_value(name, types[name], tuple(value) if isinstance(value, list | range | set) else value)
    if not chosen.writes_attention and alpha not in (None, 0, 0.0):
        raise KtError(f"alpha {alpha!r} was given to a method that leaves attention alone; use intattn, or no alpha")
    shared = {} if known is None else known.values(None, variant)
    method_values = {} if known is None else known.values(method, variant)
    values = shared | chosen.own_defaults() | method_values | given
    for name in [name for name in values if name.startswith("layers")]:
        if not values[name] and name not in given:
            del values[name]
        else:
            values[name] = tuple(int(layer) for layer in values[name])
    if chosen.depth and "layers_mlp" not in values:
        values["layers_mlp"] = layers_by_depth(model, "layers_mlp", chosen.depth)
        shown = ",".join(map(str, values["layers_mlp"]))
        warnings.warn(
            f"no preset and no layers given for {model.name}: writing layers_mlp {shown} by relative depth, those of "
            f"{method}; the rest are defaults",
            stacklevel=4,
        )
    values["alpha"] = check_alpha(values.get("alpha", "auto") if alpha is None else alpha)
    if not chosen.writes_attention:
        del values["alpha"]
    return chosen.of(values)


def _renamed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Other spellings of names and values: `layers`, JEEP's `_low` for its low region, EasyEdit's false for none."""
    named = {name.removesuffix("_low"): value for name, value in given.items() if value is not None}
    if "layers" in named:
        named["layers_mlp"] = named.pop("layers")
    if named.get("norm_constraint") is False:
        named["norm_constraint"] = None
    return named


@dataclass(frozen=True)
class Evidence:
    """A trace (α and layers) and a probe (stages of recall) of facts on the unedited model."""

    balance: Balance | None = None
    stages: Stages | None = None


def needs_evidence(config: Config) -> bool:
    """Whether layers or α come from a trace or a probe."""
    return bool(config.missing_layers) or config.traces_alpha


def resolve(
    config: Config,
    model: TracedModel,
    facts: Sequence[Fact],
    *,
    known: Evidence = Evidence(),
    seed: int = 0,
    journal: Journal | None = None,
) -> tuple[Config, Evidence]:
    """The configuration with every layer and α a number, from a trace or a probe of `facts` where nobody gave them.

    JEEP's regions come from the stages of recall, other layers from the trace that also gives α; where neither says
    anything, layers go by relative depth, and a warning says so.

    Args:
        config: what `configure` gave, or a method's configuration made by hand.
        facts: at most MOST_TRACED of them are traced, except for an α of each fact's own.
        known: what was found before, which is not asked for again.
        journal: keeps the trace.

    Returns:
        The configuration, and the evidence for it.

    Raises:
        UnknownSite: a layer that the model does not have.
        KtError: no MLP layer, or an α that cannot be traced on these facts.
    """
    missing = config.missing_layers
    probed = "layers_high" in missing
    balance, stages = known.balance, known.stages
    if (config.traces_alpha or (missing and not probed)) and balance is None:
        balance = trace_balance(model, facts, config, seed, journal)
    if probed and stages is None:
        stages = probe_stages(model, facts)
    values: dict[str, Any] = dict(_guessed_layers(model, missing, balance, stages))
    for name in [name for name in config.settings() if name.startswith("layers")]:
        layers = values.get(name, getattr(config, name))
        values[name] = tuple(sorted({model.checked(int(i)) for i in layers}))
        if name != "layers_attn" and not values[name]:
            raise KtError(f"{name} is empty; give at least one layer")
    if config.traces_alpha:
        assert balance is not None, "trace_balance gives one or raises"
        values["alpha"] = balance.alpha
    return replace(config, **values), Evidence(balance, stages)


def with_alphas(config: Config, facts: Sequence[Fact], balance: Balance) -> Config:
    """The configuration with each fact's own α; a fact that the trace left out gets that of all."""
    alphas = {f.id: f.alpha for f in balance.per_fact if f.alpha is not None}
    lacking = [f.subject for f in facts if f.id not in alphas]
    if lacking:
        warnings.warn(
            f"{len(lacking)} of {len(facts)} requests have no alpha of their own (the first: {lacking[0]!r}); "
            f"they get that of all, {balance.alpha:.3f}",
            stacklevel=4,
        )
    values: dict[str, Any] = {"alpha": tuple(alphas.get(f.id, balance.alpha) for f in facts)}
    return replace(config, **values)


def _guessed_layers(
    model: TracedModel, missing: Sequence[str], balance: Balance | None, stages: Stages | None
) -> dict[str, tuple[int, ...]]:
    """Layers that were not given: those that tracing or the probe's stages propose, else by relative depth."""
    if not missing:
        return {}
    traced = {} if balance is None else {f"layers_{kind}": v for kind, v in balance.layers.items() if v}
    probed = {} if stages is None else {"layers_mlp": stages.layers_low, "layers_high": stages.layers_high}
    layers, ways = {}, []
    for name in missing:
        sources = {
            "as traced": traced.get(name),
            "as probed": probed.get(name),
            "by relative depth": layers_by_depth(model, name),
        }
        way, layers[name] = next((way, proposed) for way, proposed in sources.items() if proposed is not None)
        ways.append(f"{name} {','.join(map(str, layers[name])) or 'none'} {way}")
    unsure = any("by relative depth" in each for each in ways)
    why = "; kt alpha and kt probe on facts that the model knows propose layers" if unsure else ""
    warnings.warn(
        f"no preset and no layers given for {model.name}: writing {', '.join(ways)}{why}; the rest are defaults",
        stacklevel=4,
    )
    return layers


DEPTHS = {"layers_mlp": (4, 8, 27), "layers_attn": (2, 4, 27), "layers_high": (22, 24, 31)}
"""First, last and the model's last layer: Qwen2.5-7B (IntAttn-Edit) and, for the high region, LLaMA-7B (JEEP)."""


def layers_by_depth(model: TracedModel, name: str, depth: tuple[int, int, int] | None = None) -> tuple[int, ...]:
    """Layers by relative depth: those of the papers' models, or a method's own `depth`, carried over to this one."""
    first, last, of = depth or DEPTHS[name]
    top = model.n_layers - 1
    return tuple(range(round(first * top / of), round(last * top / of) + 1))


def is_per_fact(config: Config) -> bool:
    """Whether every fact has its own α."""
    return getattr(config, "alpha", None) == "per-fact"


def trace_balance(
    model: TracedModel, facts: Sequence[Fact], config: Config, seed: int, journal: Journal | None = None
) -> Balance | None:
    """The balance of these facts; None if they cannot be traced and only layers are needed.

    Raises:
        KtError: α was to come of it.
    """
    try:
        return traced_balance(model, facts, seed, journal=journal, most=None if is_per_fact(config) else MOST_TRACED)
    except KtError as error:
        if not config.traces_alpha:
            return None
        raise type(error)(
            f"alpha cannot be traced on these facts ({error}); give it as a number, such as 0.3, or facts that the "
            "model knows (--alpha-facts)"
        ) from None


def traced_balance(
    model: TracedModel,
    facts: Sequence[Fact],
    seed: int = 0,
    progress: Progress | None = None,
    *,
    journal: Journal | None = None,
    most: int | None = MOST_TRACED,
) -> Balance:
    """Trace α (eq. 12) over at most `most` of the facts, evenly spaced; over all of them if it is None.

    Raises:
        KtError: the facts cannot be traced: the model does not know them, or they have no second answer.
    """
    from ..tracing import balance_factor, causal_trace

    if most is not None and len(facts) > most:
        facts = [facts[i * len(facts) // most] for i in range(most)]
    given: dict[str, Any] = {"kinds": ("mlp", "attn"), "tokens": "subject_last"}
    trace = causal_trace(model, facts, seed=seed, progress=progress, journal=journal, **given)
    return balance_factor(trace, seed=seed)


def probe_stages(model: TracedModel, facts: Sequence[Fact]) -> Stages | None:
    """The stages of recall of these facts; None where they cannot be probed."""
    from ..probing import contrast_probe

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of facts whose answers begin alike: the stages leave them out
            return contrast_probe(model, facts).stages
    except BadFact:  # not one request can be probed
        return None


def take_statistics(
    model: TracedModel,
    sites: list[Site],
    given: Statistics | str | Path | None,
    corpus: str,
    max_tokens: int,
    progress: Progress | None,
) -> Statistics:
    """The second moments that the sites need: given, from a file, or over the corpus."""
    if isinstance(given, Statistics):
        return given
    if not sites:
        return Statistics({})
    if given is not None:
        return Statistics.open(given)
    return key_statistics(model, sites, corpus, max_tokens, progress=progress)
