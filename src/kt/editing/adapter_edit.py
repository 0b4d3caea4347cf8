"""Edits of kind `adapter`: keys, values and radii at one linear map, read in every forward; the weights stay.

At each token the map's input x is held against the keys: where the nearest lies within its radius, ‖x - k_i‖ ≤ ε_i, the
map's output becomes v_i (GRACE; other rules: side_memory.py). Every token is asked, so that no row needs to know where
its prompt ends, and neither padding nor a batch nor a key-value cache changes what is read; a token in the middle of a
text is answered like a prompt that ends there.

Where radii are distances, a new key at distance d from the nearest earlier one i, with a radius of ε at first:

    d > ε_i + ε                    it is added, with radius ε
    another target, d ≤ ε_i + ε    it is added, and the two share the way: ε_new = min(ε, d / 2), ε_i no more than d / 2
    the same target                ε_i grows to d where that is more; it is added too, with radius ε

The paper does not add the last one. A later key of another target can then lie nearer to its request than key i does,
with a radius that does not reach it, and the request is lost; with a key of its own it never is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .._util.progress import Progress
from .._util.text import count
from ..errors import KtError, WorkFailed, warn_user
from ..evaluation.perplexity import check_rows, opening_rows
from ..facts.fact import Fact
from ..model.sites import Kind, Site
from ..model.tokens import encode_ids, pad_id
from ..report import Table
from ..report.table import shown
from .closed_form.aims import Position, TargetSite
from .closed_form.contexts import Contexts
from .closed_form.keys import fact_keys
from .closed_form.objective import Objective
from .closed_form.targets import find_targets
from .plan import EffectPlan, PlanText, SolveContext, SolveResult
from .side_memory import Rule, answered, reach, reader

if TYPE_CHECKING:
    from ..model.effects import Hook
    from ..model.model import TracedModel

APART = 1e-5
"""By which share a halved radius stays short of the middle (the code's 1e-5)."""
SAMPLE, OPENING = 256, 64
"""Tokens of unrelated text: their keys give the unit of radii, the mean of MEMOIR's masks, and where WISE's map is held
small. `OPENING` of them, at most, are of one document where an adapter keeps their keys."""
ANOTHER = "take another method, or the model's own tokenizer"
MOST_MET = 0.05
"""The share of those tokens from which on it is said that a memory is read by text that no request is about."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """The effect.

    Args:
        site: the linear map.
        fingerprint: SHA-256 of its weight, which no adapter changes.
        radius: of a key that is added to it later, in the keys' own unit.
        keys, values, radii: an entry a row.
        labels: by entry, the target.
        entries: by request, its entry.
        rule: how entries are read.
        unrelated: the keys of unrelated text that the rule needs.

    Raises:
        KtError: the parts do not fit each other, or a radius is not above zero.
    """

    site: Site
    fingerprint: str
    radius: float
    keys: Float[Tensor, "entry d_in"]
    values: Float[Tensor, "entry d_out"]
    radii: Float[Tensor, " entry"]
    labels: tuple[str, ...]
    entries: tuple[int, ...]
    rule: Rule = field(default_factory=Rule)
    unrelated: Float[Tensor, "token d_in"] | None = None

    kind = "adapter"
    FORM: ClassVar[dict[str, Any]] = {
        "site": str,
        "fingerprint": str,
        "radius": float,
        "labels": [str],
        "entries": [int],
        "rule": (Rule.FORM, None),
    }

    def __post_init__(self) -> None:
        n = len(self.labels)
        shapes = (self.keys.dim(), self.values.dim(), self.radii.shape) == (2, 2, (n,))
        if not n or not shapes or not len(self.keys) == len(self.values) == n:
            raise KtError("an adapter needs as many keys, values, radii and labels, at least one")
        if not self.radius > 0 or not bool((self.radii > 0).all()):
            raise KtError("an adapter's radii must lie above 0")
        if not all(0 <= entry < n for entry in self.entries):
            raise KtError("an adapter's requests name entries that it does not have")
        text = self.unrelated
        if text is not None and not len(text):
            raise KtError("an adapter's keys of unrelated text are none; solve the edit again")
        if (text is None) != self.rule.by_distance or (text is not None and text.shape[1:] != self.keys.shape[1:]):
            raise KtError(
                f"an adapter of rule {self.rule.name!r} needs keys of unrelated text only where it is no rule of "
                "distances, of the size of its own keys; solve the edit again"
            )

    @property
    def place(self) -> str:
        return str(self.site) + (f" ({self.rule.name})" if self.rule.adds else "")

    @classmethod
    def of(cls, fields: dict[str, Any], arrays: dict[str, Tensor]) -> Adapter:
        """The inverse of `fields` and `arrays`."""
        if set(arrays) - {"unrelated"} != {"keys", "values", "radii"}:
            raise KtError("an adapter has keys, values and radii")
        site, radius = Site.parse(fields["site"]), float(fields["radius"])
        tensors = arrays["keys"], arrays["values"], arrays["radii"]
        texts = tuple(fields["labels"]), tuple(fields["entries"])
        rule = Rule.of(fields.get("rule"))
        return cls(site, fields["fingerprint"], radius, *tensors, *texts, rule, arrays.get("unrelated"))

    def fields(self) -> dict[str, Any]:
        values = {"site": str(self.site), "fingerprint": self.fingerprint, "radius": self.radius}
        values |= {"labels": list(self.labels), "entries": list(self.entries)}
        return values | ({"rule": self.rule.as_dict()} if self.rule.adds else {})

    def arrays(self) -> dict[str, Tensor]:
        found = {"keys": self.keys, "values": self.values, "radii": self.radii}
        return found | ({} if self.unrelated is None else {"unrelated": self.unrelated})

    def plus(self, later: Adapter) -> Adapter:
        """Both, the later one's requests put in one after the other, as if they had been edited in this order.

        Raises:
            KtError: the later one's entries are read by another rule, or other settings of it.
        """
        if self.rule != later.rule:
            raise KtError(f"adapters at {self.site} whose entries are read by other settings do not add up to one")
        whole = self
        for entry in later.entries:
            key, value = (each[entry : entry + 1] for each in (later.keys, later.values))
            whole = whole.with_entry(key, value, later.labels[entry], later.radius)
        return whole

    def with_entry(
        self, key: Float[Tensor, "1 d_in"], value: Float[Tensor, "1 d_out"], label: str, radius: float
    ) -> Adapter:
        """With one more request; see the module. A key that is there already takes the later value."""
        apart = (self.keys.double() - key.double()).norm(dim=-1)
        nearest = int(apart.argmin())
        d, held, radii = float(apart[nearest]), float(self.radii[nearest]), self.radii.clone()
        near = self.rule.by_distance and d <= held + radius
        if d <= APART * (radius if self.rule.by_distance else float(key.norm())):
            values, labels = self.values.clone(), list(self.labels)
            if label != labels[nearest]:
                values[nearest], labels[nearest] = value[0], label
            return replace(self, values=values, labels=tuple(labels), entries=(*self.entries, nearest))
        if near and label == self.labels[nearest]:
            radii[nearest] = max(held, d)
        elif near:
            radii[nearest] = min(held, d / 2 * (1 - APART))
            radius = min(radius, d / 2)
        return replace(
            self,
            keys=torch.cat([self.keys, key]),
            values=torch.cat([self.values, value]),
            radii=torch.cat([radii, radii.new_tensor([radius])]),
            labels=(*self.labels, label),
            entries=(*self.entries, len(self.labels)),
        )

    def rendered(self, model: TracedModel, prompt: str) -> str:
        return prompt

    def recall(self, model: TracedModel, text: str) -> None:
        """Its keys are of states, not of words."""

    def hook(self, model: TracedModel) -> tuple[nn.Module, Hook]:
        linear, read, adds = model.linear(self.site), reader(self), self.rule.adds

        def deferred(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            met, value = read(inputs[0].float().flatten(0, -2))
            if not bool(met.any()):
                return output
            chosen, met = value.view(output.shape).to(output.dtype), met.view(output.shape[:-1])
            return torch.where(met[..., None], output + chosen if adds else chosen, output)

        return linear, deferred

    def refuse(self, model: TracedModel) -> None:
        sides = (model.key_size(self.site), model.value_size(self.site))
        if sides != (self.keys.shape[1], self.values.shape[1]):
            raise KtError(
                f"{self.site} of {model.name} maps {sides[0]} numbers to {sides[1]}, and the adapter's entries have "
                f"{self.keys.shape[1]} and {self.values.shape[1]}; load the model that it was made on"
            )

    def misfit(self, model: TracedModel) -> str | None:
        same = model.fingerprint([self.site]) == self.fingerprint
        return None if same else f"{self.site} of {model.name} has other weights than those the adapter was made on"

    def as_made_on(self, model: TracedModel) -> Adapter:
        return replace(self, fingerprint=model.fingerprint([self.site]))

    def overlaps(self, model: TracedModel, facts: Sequence[Fact]) -> Float[Tensor, "fact request"]:
        """How far each fact's key reaches into each request's entry: from 1 on, they meet."""
        keys = prompt_keys(model, facts, self.site, Position(self.rule.position))
        return reach(self, keys)[:, list(self.entries)]

    def table(self) -> Table:
        sizes = zip(self.labels, self.radii.tolist(), self.keys.norm(dim=-1).tolist(), strict=True)
        rows = [[shown(label), self.entries.count(i), radius, norm] for i, (label, radius, norm) in enumerate(sizes)]
        return Table(["target", "requests", "radius", "|key|"], rows, f"entries at {self.site}")


@dataclass(frozen=True)
class Codebook(EffectPlan):
    """The plan of an adapter: each request's key and value at the rule's token, put in one after the other.

    The value is the output of `layer`'s down_proj with which the model says the target, searched for from the output
    that it has (GRACE's code: the "warm" start), or its change. Keys and values do not depend on the other entries.
    """

    layer: int
    radius: float
    relative: bool
    objective: Objective
    rule: Rule = field(default_factory=Rule)

    @property
    def aim(self) -> TargetSite:
        return TargetSite(Site(Kind.MLP, self.layer), Position(self.rule.position))

    @property
    def reads_contexts(self) -> bool:
        """Whether values are searched for behind prefixes: changes are; an output is that of the bare prompt."""
        return self.rule.adds

    def describe(self) -> PlanText:
        unit = "mean key distances" if self.relative else "absolute"
        within = f"{self.radius:g} ({unit})" if self.rule.by_distance else f"{self.radius:g}"
        return PlanText(
            str(self.aim), "nothing: a codebook", SAID[self.rule.name] + within, "one request after the other"
        )

    def solve(self, context: SolveContext, facts: Sequence[Fact], progress: Progress | None = None) -> SolveResult:
        """Search for the values, all in the model without effects; then build the codebook.

        Raises:
            WorkFailed: the unit of radii is zero (the unrelated text's keys are all one).
        """
        model, site, position = context.model, self.aim.site, self.aim.position
        contexts = context.contexts if self.reads_contexts else Contexts()
        with model.restored(()):
            model.effects = ()
            unrelated = None
            if not self.rule.by_distance:
                unrelated = keys_at(model, site, opening_rows(model, SAMPLE, OPENING), ANOTHER)
            elif self.relative:
                unrelated = keys_at(model, site, check_rows(model, SAMPLE), "give radii with eps_unit=absolute")
            radius = self.radius * (mean_distance(unrelated) if self.relative and unrelated is not None else 1.0)
            search = find_targets(
                model, facts, [self.aim], contexts, self.objective, progress=progress, journal=context.journal
            )
            keys = prompt_keys(model, facts, site, position, contexts)
        if not radius > 0:
            raise WorkFailed(f"the keys of unrelated text at {site} are all one; give a radius with eps_unit=absolute")
        values = search.wanted[self.aim] - (search.before[self.aim] if self.rule.adds else 0)
        held = None if self.rule.by_distance else unrelated
        book: Adapter | None = None
        for i, fact in enumerate(facts):
            label, key, value = (fact.target or "").strip(), keys[i : i + 1], values[i : i + 1].float().cpu()
            if book is None:
                first, print_ = torch.tensor([radius]), model.fingerprint([site])
                book = Adapter(site, print_, radius, key, value, first, (label,), (0,), self.rule, held)
            else:
                book = book.with_entry(key, value, label, radius)
        if book is not None and held is not None:
            other = keys_at(model, site, check_rows(model, SAMPLE), ANOTHER)  # not those where the map is held small
            _say_who_reads(book, other)
        # Nothing is written that could come through or not, so the search stays out of the result's.
        return SolveResult({}, notes={"radius": radius}, effect=book)


def _say_who_reads(book: Adapter, unrelated: Float[Tensor, "token d_in"]) -> None:
    """Warn of a side memory that its own requests do not read, or that unrelated text does."""
    wanted = answered(book)
    if book.rule.name == "part" and not wanted.any():
        warn_user(
            "no request needs a change of the output (the model gives every target already, or the search took "
            "no step), so that no token reads this memory; give other targets, or more v_num_grad_steps"
        )
        return
    read = reader(book)
    if unread := int((wanted & ~read(book.keys).met).sum()):
        warn_user(
            f"{unread} of {count(len(wanted), 'request')} cannot be read at their own token, where next to none of the "
            "inputs differ from zero that this memory may read; let it read more of them (a larger density), or take "
            "other layers"
        )
    if (share := float(read(unrelated).met.float().mean())) > MOST_MET:
        warn_user(
            f"{share:.0%} of the tokens of unrelated text read this memory; edit fewer requests at a time, let it read "
            "more inputs (density), or ask for more (ratio, overlap)"
        )


SAID = {
    "replace": "v of the nearest key within ε = ",
    "blocks": "the low-rank block of the nearest key within ε = ",
    "part": "a side memory where a token holds of a request's own change at least ",
    "overlap": "the side memory of a mask that is shared by ",
}


def prompt_keys(
    model: TracedModel,
    facts: Sequence[Fact],
    site: Site,
    position: Position = Position.PROMPT_LAST,
    contexts: Contexts | None = None,
) -> Float[Tensor, "fact d_in"]:
    """The site's input at each prompt's token, float32 on the CPU."""
    return fact_keys(model, facts, contexts or Contexts(), site, position).T.float().cpu().contiguous()


def keys_at(
    model: TracedModel, site: Site, rows: Sequence[tuple[int, ...]], remedy: str
) -> Float[Tensor, "token d_in"]:
    """The site's keys at the tokens of unrelated text, float32 on the CPU.

    Raises:
        KtError: there are none, with the remedy.
    """
    if not rows:
        raise KtError(f"the tokenizer of {model.name} reads less than two tokens of every unrelated text; {remedy}")
    batch = encode_ids(rows, pad_id(model.tokenizer)).to(model.device)
    keys = model.read(batch, [site], "key")[site].float()
    # A row's first token has a key like no other.
    return keys[(batch.mask.bool() & (batch.positions > 0)).to(keys.device)].cpu()


def mean_distance(keys: Float[Tensor, "token d_in"]) -> float:
    """Between two of the keys: a unit of the site's own."""
    return float(torch.pdist(keys).mean())
