"""From what a user asks to what a solve needs: requests, hyper-parameters, α and layers, second moments."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._util.progress import Progress
from ..errors import BadFact, KtError
from ..facts.fact import Fact
from ..facts.load import facts_from
from ..model.sites import Site
from ..model.tokens import template_span
from ..presets import Preset, preset_for
from .closed_form.second_moment import Statistics, key_statistics
from .config import HyperParameters
from .methods import Method, default_layers, method_named

if TYPE_CHECKING:
    from ..model.model import TracedModel
    from ..probing import Stages
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
        asked = " ".join(fact.prompt.split()).casefold()
        earlier, other = seen.setdefault(asked, (number, fact))
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


@dataclass(frozen=True)
class MethodRequest:
    """A method with what was given for it: by the user, by a preset, or by neither."""

    name: str
    method: Method
    preset: Preset | None
    variant: str | None
    given: Mapping[str, Any]
    alpha: float | str | None

    @classmethod
    def of(
        cls,
        model: TracedModel,
        method: str,
        alpha: float | str | None,
        preset: str | None,
        variant: str | None,
        given: Mapping[str, Any],
    ) -> MethodRequest:
        chosen, known = method_named(method), preset_for(model, preset)
        if variant is not None and known is None:
            raise KtError(f"no preset matches {model.name}, so there is no variant {variant!r}; give --preset")
        # JEEP's files name its low region so; the other methods have no suffix for the same things.
        given = {k.removesuffix("_low"): v for k, v in given.items() if v is not None}
        if "layers" in given:
            given["layers_mlp"] = given.pop("layers")
        if given.get("norm_constraint") is False:  # EasyEdit's files write "none" so
            given["norm_constraint"] = None
        names = {f.name for f in fields(HyperParameters)} - {"alpha"}
        if unknown := sorted(set(given) - names):
            raise KtError(f"hyper-parameter {unknown[0]!r} is unknown; known are {', '.join(sorted(names))}")
        if not chosen.writes_attention and alpha not in (None, 0, 0.0):
            raise KtError(
                f"alpha {alpha!r} was given to a method that leaves attention alone; use intattn, or no alpha"
            )
        asked = cls(method, chosen, known, variant, given, alpha)
        asked.fixed_alpha()  # a wrong number fails now
        return asked

    def chosen(self) -> dict[str, Any]:
        """The preset's shared values, then the method's, then the preset's for this method, then the user's."""
        own: dict[str, Any] = {}
        shared: dict[str, Any] = {}
        if self.preset is not None:
            shared, own = self.preset.values(None, self.variant), self.preset.values(self.name, self.variant)
        return shared | dict(self.method.defaults) | own | dict(self.given)

    def fixed_alpha(self) -> float | None:
        """α where it is a number: the user's or the preset's; None where it is to be traced."""
        if not self.method.writes_attention:
            return 0.0
        alpha = self.chosen().get("alpha", "auto") if self.alpha is None else self.alpha
        if alpha in ("auto", "per-fact"):
            return None
        try:
            value = float(alpha)
        except (TypeError, ValueError):
            value = float("nan")
        if not 0 <= value <= 1:
            raise KtError(f"alpha {alpha!r} must be auto, per-fact, or lie between 0 (MLP only) and 1 (attention only)")
        return value

    def missing_layers(self) -> list[str]:
        """The layer sets that the method needs and that neither the user nor a preset gives."""
        chosen = self.chosen()
        return [name for name in self.method.needs if not chosen.get(name) and name not in self.given]

    @property
    def needs_probe(self) -> bool:
        """Whether layers are to come from the stages of recall: JEEP's regions, when nobody gave the high one."""
        return "layers_high" in self.missing_layers()

    @property
    def needs_trace(self) -> bool:
        traced = {"layers_mlp", "layers_attn"} & set(self.missing_layers())
        return self.fixed_alpha() is None or (bool(traced) and not self.needs_probe)

    def resolve(self, model: TracedModel, balance: Balance | None, stages: Stages | None = None) -> HyperParameters:
        """Every value, with layers and α from the trace or the probe where they are to come from it."""
        chosen = {k: v for k, v in self.chosen().items() if k != "alpha"}
        chosen |= self._guessed(model, balance, stages)
        for name in ("layers_mlp", "layers_attn", "layers_high"):
            chosen[name] = tuple(sorted({model.checked(int(i)) for i in chosen.get(name, ())}))
            if name in self.method.needs and name != "layers_attn" and not chosen[name]:
                raise KtError(f"{name} is empty; give at least one layer")
        alpha = self.fixed_alpha()
        if alpha is None:
            assert balance is not None, "needs_trace said so"
            alpha = balance.alpha
        known = {f.name for f in fields(HyperParameters)}
        return HyperParameters(**{k: v for k, v in chosen.items() if k in known}, alpha=alpha).checked()

    def _guessed(
        self, model: TracedModel, balance: Balance | None, stages: Stages | None
    ) -> dict[str, tuple[int, ...]]:
        """Layers that nobody gave: those that tracing or the probe's stages propose, else by relative depth."""
        missing = self.missing_layers()
        if not missing:
            return {}
        by_depth = default_layers(model)
        traced = {} if balance is None else {f"layers_{kind}": v for kind, v in balance.layers.items() if v}
        probed = {} if stages is None else {"layers_mlp": stages.layers_low, "layers_high": stages.layers_high}
        found, said = {}, []
        for name in missing:
            named = {"as traced": traced.get(name), "as probed": probed.get(name), "by relative depth": by_depth[name]}
            way, found[name] = next((way, layers) for way, layers in named.items() if layers is not None)
            said.append(f"{name} {_listed(found[name])} {way}")
        unsure = any("by relative depth" in each for each in said)
        why = "; kt alpha and kt probe on facts that the model knows propose layers" if unsure else ""
        warnings.warn(
            f"no preset and no layers given for {model.name}: writing {', '.join(said)}{why}; the rest are defaults",
            stacklevel=4,
        )
        return found

    def alphas(self, facts: Sequence[Fact], balance: Balance | None) -> tuple[float, ...] | None:
        """Each fact's own α (`per-fact`); one that the trace left out gets that of all."""
        if self.alpha != "per-fact" or balance is None:
            return None
        own = {f.id: f.alpha for f in balance.per_fact if f.alpha is not None}
        lacking = [f.subject for f in facts if f.id not in own]
        if lacking:
            warnings.warn(
                f"{len(lacking)} of {len(facts)} requests have no alpha of their own (the first: {lacking[0]!r}); "
                f"they get that of all, {balance.alpha:.3f}",
                stacklevel=4,
            )
        return tuple(own.get(f.id, balance.alpha) for f in facts)


def trace_balance(
    model: TracedModel, facts: Sequence[Fact], asked: MethodRequest, seed: int, journal: Journal | None = None
) -> Balance | None:
    """The balance of these facts; None where they cannot be traced and only layers were to come of it.

    Raises:
        KtError: α was to come of it.
    """
    from ..tracing import balance_factor, causal_trace

    if asked.alpha != "per-fact" and len(facts) > MOST_TRACED:
        facts = [facts[i * len(facts) // MOST_TRACED] for i in range(MOST_TRACED)]
    try:
        trace = causal_trace(model, facts, kinds=("mlp", "attn"), seed=seed, journal=journal)
        return balance_factor(trace, seed=seed)
    except KtError as error:
        if asked.fixed_alpha() is not None:
            return None
        raise type(error)(
            f"alpha cannot be traced on these facts ({error}); give it as a number, such as 0.3, or facts that the "
            "model knows (--alpha-facts)"
        ) from None


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
    if corpus == "demo" and model.name != "demo":
        warnings.warn(
            "second moments are taken over the small demo corpus, which is not this model's kind of text; "
            "pass statistics= (kt cov --corpus) for results that count",
            stacklevel=4,
        )
    return key_statistics(model, sites, corpus, max_tokens, progress=progress)


def _listed(layers: Sequence[int]) -> str:
    return ",".join(map(str, layers)) or "none"
