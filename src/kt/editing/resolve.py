"""The inputs of a solve from a user's: requests, a configuration with all layers and α, second moments.

`configure` makes a method's configuration of the user's values and the preset's; `resolve` fills in what neither gives,
and is the only part of editing that traces or probes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._util.progress import Progress, named
from .._util.text import count, some_of
from ..errors import BadFact, KtError, warn_user
from ..facts.fact import Fact
from ..facts.load import FactsLike, facts_from
from ..model.scoring import Question, readable
from ..model.sites import Kind, Site
from ..model.tokens import template_span
from ..runs.journal import Journal
from .closed_form.second_moment import Statistics, key_statistics
from .config import Config
from .evidence import (
    NOTHING,
    Alpha,
    Evidence,
    alpha_of,
    default_alpha,
    kept_balance,
    kept_settings,
    probe_stages,
    trace_balance,
)
from .presets import configured, preset_for

if TYPE_CHECKING:
    from ..model.model import TracedModel
    from ..probing import Stages
    from ..tracing import Balance


def read_requests(model: TracedModel, requests: FactsLike) -> list[Fact]:
    """Facts with a target each.

    Those that the model cannot read are left out, and counted in a warning.

    Raises:
        BadFact: a target is empty or the old answer, or the model can read no request.
        SubjectNotFound: a subject is not in its prompt.
    """
    facts = [fact.as_request() for fact in facts_from(requests)]
    if not facts:
        raise KtError("no requests to edit; give at least one")
    for fact in facts:
        template_span(model.reader, fact.template, fact.subject)  # fails here, before any work, with its one line
    return readable(model, facts, lambda fact: [_question(fact)])


def _question(fact: Fact) -> Question:
    """A request's prompt and target; kt.model.scoring has the form."""
    join = fact.target_prefix
    return (fact.prompt, fact.target) if join is None else (fact.prompt, fact.target, join)


def distinct_requests(facts: Sequence[Fact], strict: bool = False) -> list[Fact]:
    """The requests of a batch, each edit once: chains of several edits share some (MQuAKE), and twice in a solve it
    would weigh twice. (Scores ask every record, each with its own consequences.) Contradicting ones are left out first,
    or refused; see `without_contradictions`."""
    facts = without_contradictions(facts, strict)
    kept = list({prompt_asked(fact): fact for fact in reversed(facts)}.values())[::-1]
    if copies := len(facts) - len(kept):
        warn_user(
            f"{copies:,} of {len(facts):,} requests ask for an edit that another asks for; each is solved once, "
            f"{len(kept):,} in all"
        )
    same = defaultdict(list)
    for fact in kept:
        if fact.relation:
            same[fact.subject.casefold(), fact.relation].append(fact)
    torn = [group for group in same.values() if len({f.target for f in group}) > 1]
    if torn:
        first, others = torn[0], f", and so do those about {count(len(torn) - 1, 'more subject')}" * (len(torn) > 1)
        one, two = list(dict.fromkeys(fact.target for fact in first))[:2]
        warn_user(
            f"{len(first)} requests give {first[0].subject!r} different targets of one relation ({one!r}, {two!r})"
            f"{others}; they may undo each other"
        )
    return kept


def without_contradictions(facts: Sequence[Fact], strict: bool = False) -> list[Fact]:
    """The requests of a batch without those that give an earlier one's prompt another target: both cannot be written.

    Published data sets hold some (2 of MQuAKE-hard's 1,716 edits, 79 of 10,000 in EasyEdit's CounterFact). A warning
    counts them and names the first. Multi-hop questions of a chain that loses an edit are left out too.

    Args:
        strict: refuse them.

    Raises:
        BadFact: `strict`, and two requests contradict each other.
    """
    first: dict[str, tuple[int, Fact]] = {}
    kept, out, told = list[Fact](), list[Fact](), ""
    for number, fact in enumerate(facts, start=1):
        earlier, other = first.setdefault(prompt_asked(fact), (number, fact))
        if other.target == fact.target:
            kept.append(fact)
            continue
        told = told or (
            f"requests {earlier} and {number} contradict each other: {fact.prompt!r} is to become {other.target!r} and "
            f"{fact.target!r}"
        )
        if strict:
            raise BadFact(f"{told}; keep one of them (or edit them in sequence)")
        out.append(fact)
    if not out:
        return kept
    chains = {chain for fact in out if (chain := fact.id.rpartition("-")[0])}
    whole = [_unchained(fact) if fact.id.rpartition("-")[0] in chains else fact for fact in kept]
    n_cut = sum(old is not new for old, new in zip(kept, whole, strict=True))
    warn_user(
        f"{len(out):,} of {len(facts):,} requests contradict an earlier one and are left out"
        + (f", and so are the multi-hop questions of {count(n_cut, 'chain')}" if n_cut else "")
        + f" ({some_of([fact.id for fact in out], 5, ', ...')}; {told}; --strict refuses them)"
    )
    return whole


def prompt_asked(fact: Fact) -> str:
    """The prompt by which requests are compared."""
    return " ".join(fact.prompt.split()).casefold()


def _unchained(fact: Fact) -> Fact:
    """The fact without multi-hop questions, which need all edits of their chain."""
    hops = tuple(hop for hop in fact.hops if hop.kind != "multi_hop")
    return fact if len(hops) == len(fact.hops) else replace(fact, hops=hops)


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
        given: hyper-parameters by name; None counts as not given.

    Returns:
        The configuration. Layers that nobody gave, and an α that is to be traced, are left to `resolve`.

    Raises:
        KtError: an unknown method, preset or variant, a setting that the method does not have, or a value of the wrong
            type, sign or range.
    """
    known = preset_for(model, preset)
    if variant is not None and known is None:
        raise KtError(f"no preset matches {model.name}, so there is no variant {variant!r}; give --preset")
    return configured(known, method, alpha, variant, **given)


def resolve(
    config: Config,
    model: TracedModel,
    facts: Sequence[Fact],
    *,
    alpha_facts: Sequence[Fact] | None = None,
    known: Evidence = NOTHING,
    seed: int = 0,
    journal: Journal | None = None,
) -> tuple[Config, Evidence]:
    """The configuration with every layer and α a number; a warning says where those come from that nobody gave.

    Layers: those that `kt layers` found for this method and these weights; JEEP's regions from the stages of recall;
    else by relative depth. Not those of a trace: where a fact is read is not where an edit takes (docs/real-models.md).
    α: see `default_alpha`.

    Args:
        config: what `configure` gave, or a method's configuration made by hand.
        facts: the requests, which a probe and an α of each fact's own are of.
        alpha_facts: facts named for α, of which at most MOST_TRACED are traced.
        known: what was chosen before, which is not asked for again.
        journal: keeps the trace, and which kept results there were.

    Returns:
        The configuration, and the evidence for it.

    Raises:
        UnknownSite: a layer that the model does not have.
        KtError: no MLP layer, or an α that cannot be traced on facts that were named for it.
    """
    evidence = known
    if config.missing_layers or config.traces_alpha:
        evidence = _evidence(config, model, facts, alpha_facts, known, seed, journal or Journal())
    values: dict[str, Any] = {k: v for k, v in evidence.chosen.items() if k == "alpha" or k in config.missing_layers}
    for name in config.layer_settings:
        layers = values.get(name, getattr(config, name))
        values[name] = tuple(sorted({model.checked(int(i)) for i in layers}))
        if name != "layers_attn" and not values[name]:
            raise KtError(f"{name} is empty; give at least one layer")
    return replace(config, **values), evidence


def _evidence(
    config: Config,
    model: TracedModel,
    facts: Sequence[Fact],
    alpha_facts: Sequence[Fact] | None,
    known: Evidence,
    seed: int,
    journal: Journal,
) -> Evidence:
    """The settings that nobody gave, with where they come from; one warning for all of them."""
    balance = None
    if is_per_fact(config):
        balance = trace_balance(model, facts, True, seed, journal)
        known = replace(known, balance=balance, chosen={**known.chosen, "alpha": balance.alpha})
    if known.sources:
        return known
    kept = journal.take("kept-layers", kept_settings, model, config.name)
    chosen, sources = dict(known.chosen), {}
    if config.traces_alpha and not is_per_fact(config):
        if alpha_facts:
            alpha = alpha_of(trace_balance(model, alpha_facts, False, seed, journal), "traced")
        elif "alpha" in kept:
            alpha = Alpha(*kept["alpha"], None)
        else:
            alpha = default_alpha(model, facts, journal)
        chosen["alpha"], sources["alpha"], balance = alpha
    missing = config.missing_layers
    stages = probe_stages(model, alpha_facts or facts) if "layers_high" in missing else None
    if missing and balance is None:
        balance = kept_balance(model, journal)
    for name in missing:
        chosen[name], sources[name] = _layers(model, config, name, kept, stages, balance)
    _say(model, chosen, sources, missing)
    return Evidence(balance, stages, chosen, sources)


def _layers(
    model: TracedModel,
    config: Config,
    name: str,
    kept: Mapping[str, tuple[Any, str]],
    stages: Stages | None,
    balance: Balance | None,
) -> tuple[tuple[int, ...], str]:
    """Layers for one setting, and where they come from."""
    kind = name.removeprefix("layers_")
    if name in kept:
        return tuple(kept[name][0]), f"as kept ({kept[name][1]})"
    if name == "layers_mlp" and config.depth:
        return default_layers(model, config, name), f"by relative depth, those of {config.name}"
    probed = {} if stages is None else {"layers_mlp": stages.layers_low, "layers_high": stages.layers_high}
    there = model.layers_with(Kind.ATTN if kind == "attn" else Kind.MLP)
    if (layers := probed.get(name)) is not None:
        return tuple(layer for layer in layers if name != "layers_mlp" or layer in there), "as probed"
    traced = () if balance is None else balance.layers.get(kind, ())
    why = f" (traced {','.join(map(str, traced))}, where the fact is read)" if traced else ""
    return default_layers(model, config, name), f"by relative depth{why}"


def _say(model: TracedModel, chosen: Mapping[str, Any], sources: Mapping[str, str], missing: Sequence[str]) -> None:
    """One line on what nobody gave."""
    ways = [f"{name} {','.join(map(str, chosen[name])) or 'none'} {sources[name]}" for name in missing]
    ways += [f"alpha {chosen['alpha']:.3g} ({sources['alpha']})"] if "alpha" in sources else []
    unsure = any(source.startswith("by relative depth") for source in sources.values())
    why = "; kt layers finds layers by editing, kt probe shows the stages of recall" if unsure else ""
    lacking = "no layers" if missing else "no alpha"
    rest = "; the rest is a preset's where one is used, else the defaults" if missing else ""
    if ways:
        warn_user(f"{lacking} given for {model.name}: writing {', '.join(ways)}{why}{rest}")


def with_alphas(config: Config, facts: Sequence[Fact], balance: Balance) -> Config:
    """The configuration with each fact's own α; a fact that the trace left out gets that of all."""
    alphas = {f.id: f.alpha for f in balance.per_fact if f.alpha is not None}
    lacking = [f.subject for f in facts if f.id not in alphas]
    if lacking:
        warn_user(
            f"{len(lacking)} of {len(facts)} requests have no alpha of their own (the first: {lacking[0]!r}); "
            f"they get that of all, {balance.alpha:.3f}"
        )
    values: dict[str, Any] = {"alpha": tuple(alphas.get(f.id, balance.alpha) for f in facts)}
    return replace(config, **values)


DEPTHS = {"layers_mlp": (4, 8, 27), "layers_attn": (2, 4, 27), "layers_high": (22, 24, 31)}
"""First, last and the model's last layer: Qwen2.5-7B (IntAttn-Edit) and, for the high region, LLaMA-7B (JEEP)."""


def layers_by_depth(model: TracedModel, name: str, depth: tuple[int, int, int] | None = None) -> tuple[int, ...]:
    """Layers by relative depth: those of the papers' models, or a method's own `depth`, carried over to this one."""
    first, last, of = depth or DEPTHS[name]
    top = model.n_layers - 1
    layers = range(round(first * top / of), round(last * top / of) + 1)
    kind = {"layers_mlp": Kind.MLP, "layers_attn": Kind.ATTN}.get(name, Kind.RESID)
    there = model.layers_with(kind)
    if not there:
        part = "MLP" if kind is Kind.MLP else "attention or other mixer"
        raise KtError(
            f"no block of {model.name} has an {part}, which {name} are of; choose a method that writes others"
        )
    inside = tuple(layer for layer in layers if layer in there)
    return inside or tuple(sorted(there, key=lambda layer: abs(layer - layers[-1]))[:1])


def default_layers(model: TracedModel, config: Config, name: str) -> tuple[int, ...]:
    """A layer setting by relative depth, of the method's own depth where it has one."""
    return layers_by_depth(model, name, config.depth if name == "layers_mlp" else None)


def is_per_fact(config: Config) -> bool:
    """Whether every fact has its own α."""
    return getattr(config, "alpha", None) == "per-fact"


def take_statistics(
    model: TracedModel,
    sites: list[Site],
    given: Statistics | str | Path | None,
    corpus: str,
    max_tokens: int | None,
    progress: Progress | None,
) -> Statistics:
    """The second moments that the sites need: given, from a file (of all that is needed), or over the corpus."""
    if isinstance(given, Statistics):
        return given
    if not sites:
        return Statistics({})
    if given is not None:
        opened = Statistics.open(given)
        parts = [part for site in sites for part in model.parts(site)]
        opened.require({model.weight_name(part): model.key_size(part) for part in parts})
        return opened
    told = named(progress, "second moments, once and kept: tokens")
    return key_statistics(model, sites, corpus, max_tokens, progress=told)
