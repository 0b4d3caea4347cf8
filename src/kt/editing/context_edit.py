"""Edits of kind `context`: the model's weights stay, and text about the facts is put before its prompts.

    New Fact: {demonstration's fact}      demonstrations (IKE): the fact again (copy), in other words (update), or
    Prompt: {question} {answer}           another fact that stays as it is (retain)
    ...
    New Fact: {the fact}                  of the request that is nearest to the prompt (retrieval.py)
    Prompt: {the prompt}

A prompt that no fact is near to (by BM25: none shares a word) is read as it is; where that holds of a request's own
prompt, a warning says so. SCR asks the model itself, of each of the nearest facts, whether it answers the prompt (one
that begins with the prompt does, unasked); where none does, the prompt too is read as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .._util.progress import Progress
from .._util.text import some_of
from ..errors import KtError, warn_user
from ..facts.fact import Fact, words_at
from ..facts.load import load_facts
from ..model.effects import Rendered
from ..model.scoring import Question, answer_row, teacher_force
from ..model.tokens import joint_text, token_ids
from ..report import Table
from ..report.table import shown
from ..runs import parallel
from .plan import EffectPlan, PlanText, SolveContext, SolveResult
from .retrieval import BM25, RETRIEVERS, Embeddings, Mixed, Retriever, embedded, origin

if TYPE_CHECKING:
    from torch import nn

    from ..model.effects import Hook
    from ..model.model import TracedModel

TEMPLATE = "Prompt: {}"
KINDS = {
    "own": ("copy", "update", "copy", "retain"),
    "paper": ("copy", "update", "retain", "update", "retain", "update", "retain", "retain"),
}
"""Kinds of demonstrations in turn. The IKE paper has 1 copy to 3 updates to 4 retained, for GPT-J; where half of them
pass the fact by, a small model passes it by too (docs/methods.md)."""
ROOM = 0.5
"""The share of the model's positions that text before a prompt may take."""
CONFIRM = "Fact: {fact}.\nQuestion: {prompt}\nAnswered by the fact:"
EXAMPLES = tuple(
    CONFIRM.format(fact=fact, prompt=prompt) + f" {answer}\n\n"
    for fact, prompt, answer in (
        ("The capital of Peru is Cairo", "The capital city of Peru is called", "yes"),
        ("The capital of Peru is Cairo", "The capital of Spain is", "no"),
        ("Hamlet was written by Goethe", "The author of Hamlet is", "yes"),
        ("Hamlet was written by Goethe", "Hamlet is the prince of", "no"),
    )
)

SETTINGS = ("template", "select", "retriever", "nearness")
"""What a fact of a context edit keeps where other edits' facts are beside it."""


@dataclass(frozen=True)
class Context:
    """The effect: for each fact, what the retriever reads (`documents`) and what stands before the prompt (`contexts`).

    `select`: how many of the nearest facts the model is asked about, the nearest first; 0 takes the nearest unasked.
    `fingerprint`: SHA-256 of the token embedding of the model that it was made on; nothing where that is not known.
    `retriever`: bm25, or embeddings, which needs the documents' `vectors`, their `centre` and the least `nearness`.

    Where edits with other settings were put together, `template`, `select`, `retriever` and `nearness` have a value a
    fact. `vectors` are of the facts that embeddings find, in their order; `centre` has a row for all, or one a vector.

    Raises:
        KtError: there is no fact, a setting is out of its range, or a retriever lacks what it needs.
    """

    documents: tuple[str, ...]
    contexts: tuple[str, ...]
    template: str | tuple[str, ...] = TEMPLATE
    select: int | tuple[int, ...] = 0
    fingerprint: str = ""
    retriever: str | tuple[str, ...] = RETRIEVERS[0]
    nearness: float | tuple[float, ...] = 0.0
    vectors: Tensor | None = field(default=None, compare=False, repr=False)
    centre: Tensor | None = field(default=None, compare=False, repr=False)

    kind = "context"
    place = "prompt"

    def __post_init__(self) -> None:
        if not self.documents or len(self.documents) != len(self.contexts):
            raise KtError("a retriever without facts finds nothing; give at least one request")
        for name in SETTINGS:
            if len(self._each(name)) != len(self.documents):
                raise KtError(f"{name} of a context edit is one value, or one a fact; solve the edit again")
        if not all("{}" in template for template in self._each("template")):
            raise KtError("the template of a context edit has no {} for the prompt; solve the edit again")
        if not all(select >= 0 for select in self._each("select")):
            raise KtError("select of a context edit is a number of facts, from 0 on; solve the edit again")
        if not all(-1 <= nearness <= 1 for nearness in self._each("nearness")):
            raise KtError("nearness of a context edit is a cosine, from -1 to 1; solve the edit again")
        unknown = next((name for name in self._each("retriever") if name not in RETRIEVERS), None)
        if unknown is not None or bool(self._by_states) == (self.vectors is None):
            name = unknown or self._each("retriever")[0]
            raise KtError(
                f"the retriever {name[:40]!r} of this edit is unknown, or lacks its vectors; solve the edit again"
            )
        if self.vectors is not None and (self.vectors.dim() != 2 or len(self.vectors) != len(self._by_states)):
            raise KtError("a retriever by embeddings needs a vector a fact; solve the edit again")
        shapes = [None] if self.vectors is None else [(n, self.vectors.shape[1]) for n in (1, len(self.vectors))]
        if (None if self.centre is None else tuple(self.centre.shape)) not in shapes:
            raise KtError("a retriever by embeddings needs a centre of its vectors' size; solve the edit again")

    def _each(self, name: str) -> tuple[Any, ...]:
        """A setting by fact."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.documents)

    @property
    def _by_states(self) -> list[int]:
        """The facts that embeddings find."""
        return [i for i, name in enumerate(self._each("retriever")) if name == "embeddings"]

    def plus(self, later: Context) -> Context:
        """Both; each fact keeps the settings of its own edit.

        Raises:
            KtError: their vectors are states of models of different sizes.
        """
        joint: dict[str, Any] = {}
        for name in SETTINGS:
            values = self._each(name) + later._each(name)
            joint[name] = values[0] if len(set(values)) == 1 else values
        parts = ((each.vectors, each.centre) for each in (self, later))
        known = [(vectors, centre) for vectors, centre in parts if vectors is not None and centre is not None]
        if len({vectors.shape[1] for vectors, _ in known}) > 1:
            raise KtError("the facts' vectors are states of models of different sizes; solve them on one model")
        if known:
            centre = known[0][1]
            same = len(centre) == 1 and all(other.float().equal(centre.float()) for _, other in known)
            rows = centre if same else torch.cat([centre.expand(len(vectors), -1) for vectors, centre in known])
            joint |= {"vectors": torch.cat([vectors for vectors, _ in known]), "centre": rows}
        texts = self.documents + later.documents, self.contexts + later.contexts
        return Context(*texts, fingerprint=later.fingerprint, **joint)

    def rendered(self, model: TracedModel, prompt: str) -> str:
        """The prompt with the nearest fact before it that is its own edit's to put there: at once, or where the model
        confirms it."""
        nearest, selects = self._nearest(model, prompt), self._each("select")
        candidates = (i for n, i in enumerate(nearest) if not selects[i] or n < selects[i])
        # A request's own prompt needs no answer of the model, which may be too small to give one.
        taken = (
            i
            for i in candidates
            if not selects[i] or begins(self.documents[i], prompt) or confirms(model, self.documents[i], prompt)
        )
        chosen = next(taken, None)
        if chosen is None:
            return prompt
        return self.contexts[chosen] + self._each("template")[chosen].replace("{}", prompt)

    def recall(self, model: TracedModel, text: str) -> str | None:
        return next((self.documents[i] for i in self._nearest(model, text)), None)

    def _nearest(self, model: TracedModel, prompt: str) -> list[int]:
        """The facts near to a prompt, the nearest first. Those that begin with it, which are answers to it, stand in
        front, the latest first: a later edit of a prompt counts, also where BM25 finds an earlier, shorter fact."""
        nearest = self.by_nearness(model).nearest(prompt)
        own = [i for i in nearest if begins(self.documents[i], prompt)]
        return sorted(own, reverse=True) + [i for i in nearest if i not in own]

    def by_nearness(self, model: TracedModel) -> Retriever:
        """The retriever over its documents."""
        if self.vectors is None or self.centre is None:
            return self._by_words
        among = self._by_states
        nearness = [self._each("nearness")[i] for i in among]
        states = Embeddings(model, self.vectors, self.centre, nearness)
        return states if len(among) == len(self.documents) else Mixed(self._by_words, states, among)

    def hook(self, model: TracedModel) -> tuple[nn.Module, Hook] | None:
        return None

    def refuse(self, model: TracedModel) -> None:
        """Text fits every model; vectors are held against its states."""
        if self.vectors is not None and self.vectors.shape[1] != model.d_model:
            raise KtError(
                f"the facts' vectors have {self.vectors.shape[1]} numbers and the states of {model.name} "
                f"{model.d_model}; load the model that they were made on"
            )

    def misfit(self, model: TracedModel) -> str | None:
        same = not self.fingerprint or embedding_of(model) == self.fingerprint
        return None if same else f"the token embedding of {model.name} is not that of the model the text was made for"

    def as_made_on(self, model: TracedModel) -> Context:
        return replace(self, fingerprint=embedding_of(model))

    def overlaps(self, model: TracedModel, facts: Sequence[Fact]) -> None:
        """Facts compete by their words alone."""

    def arrays(self) -> dict[str, Tensor]:
        parts = {"vectors": self.vectors, "centre": self.centre}
        return {name: part for name, part in parts.items() if part is not None}

    def fields(self) -> dict[str, Any]:
        names = [name for name in self.FORM if self.vectors is not None or name not in ("retriever", "nearness")]
        values = {name: getattr(self, name) for name in names}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    FORM: ClassVar[dict[str, Any]] = {
        "documents": [str],
        "contexts": [str],
        "template": (str, [str]),
        "select": (int, [int]),
        "fingerprint": str,
        "retriever": (str, [str], None),
        "nearness": (float, [float], None),
    }

    @classmethod
    def of(cls, fields: dict[str, Any], arrays: dict[str, Tensor]) -> Context:
        """The inverse of `fields` and `arrays`; a field that is null counts as absent.

        Raises:
            KtError: there are other tensors, or see the class.
        """
        if other := sorted(arrays.keys() - {"vectors", "centre"}):
            raise KtError(f"its tensor {other[0][:40]!r} belongs to no context edit")
        known = {name: fields[name] for name in cls.FORM if fields.get(name) is not None}
        tuples = {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
        return cls(**known | tuples, vectors=arrays.get("vectors"), centre=arrays.get("centre"))

    def table(self) -> Table:
        sizes = [len(context.split()) for context in self.contexts]
        rows = [[shown(document), size] for document, size in zip(self.documents, sizes, strict=True)]
        return Table(["fact", "words before the prompt"], rows, "text put before prompts")

    @cached_property
    def _by_words(self) -> BM25:
        return BM25(self.documents)


def begins(fact: str, prompt: str) -> bool:
    """Whether the fact begins with the prompt, up to the end of a word: "The capital of Nigeria is" does not with "The
    capital of Niger"."""
    return 0 in words_at(fact, prompt.rstrip())


def confirms(model: TracedModel, fact: str, prompt: str) -> bool:
    """Whether the model, shown examples, finds yes likelier than no: the fact answers the prompt."""
    asked = Rendered(fitting(model, EXAMPLES, CONFIRM.format(fact=fact, prompt=prompt)))
    questions: list[Question] = [(asked, "yes"), (asked, "no")]
    with parallel.alone():
        scores = teacher_force(model, [answer_row(model, q) for q in questions], allow_nan=True)
    yes, no = (scores[question].log_prob for question in questions)
    return yes is not None and no is not None and yes > no


@dataclass(frozen=True)
class InContext(EffectPlan):
    """A plan without a solve: `shots` demonstrations a fact from the records in `pool`, the nearest last."""

    shots: int = 0
    pool: str = "auto"
    kinds: str = "own"
    select: int = 0
    retriever: str = RETRIEVERS[0]
    nearness: float = 0.0

    def describe(self) -> PlanText:
        shown = f"{self.shots} demonstrations and the fact" if self.shots else "the fact"
        order = f"the nearest of {self.select} that the model confirms" if self.select else "the nearest fact"
        return PlanText("no search", "nothing: text before the prompt", f"none: {shown}", order)

    def solve(self, context: SolveContext, facts: Sequence[Fact], progress: Progress | None = None) -> SolveResult:
        """The texts before each fact's prompts, as many demonstrations as the model has room for.

        Raises:
            KtError: no demonstrations are left once those about the requests' own subjects are out.
        """
        documents = [said(fact) for fact in facts]
        shown = self._demonstrations(context.model, facts) if self.shots else [()] * len(facts)
        contexts = [
            fitting(context.model, each, f"New Fact: {document}\n")
            for each, document in zip(shown, documents, strict=True)
        ]
        known: dict[str, Any] = {}
        if self.retriever == "embeddings":
            vectors, centre = embedded(context.model, documents), origin(context.model)
            known = {"retriever": self.retriever, "nearness": self.nearness, "vectors": vectors, "centre": centre}
        texts, fingerprint = (tuple(documents), tuple(contexts)), embedding_of(context.model)
        effect = Context(*texts, select=self.select, fingerprint=fingerprint, **known)
        found = effect.by_nearness(context.model).found([fact.prompt for fact in facts])
        not_found = [fact.id or fact.prompt for fact, near in zip(facts, found, strict=True) if not near]
        if not_found:
            self._warn_of(not_found, len(facts))
        return SolveResult({}, notes={"not_found": not_found} if not_found else {}, effect=effect)

    def _warn_of(self, not_found: Sequence[str], among: int) -> None:
        """Their own prompts will be read as they are, whatever the model is."""
        why, remedy = "they share no word", "give retriever=embeddings, or write the prompts in words"
        if self.retriever == "embeddings":
            why, remedy = f"their cosine is below {self.nearness:g}", "lower nearness, or give retriever=bm25"
        some = some_of(list(map(repr, not_found)))
        warn_user(
            f"the prompts of {len(not_found)} of {among} requests do not find their facts ({some}): {why}; {remedy}"
        )

    def _demonstrations(self, model: TracedModel, facts: Sequence[Fact]) -> list[tuple[str, ...]]:
        """Texts for each fact, the nearest last."""
        subjects = {fact.subject.casefold() for fact in facts}
        records = [f.as_request() for f in demonstrations(self.pool, model.name) if f.target or f.foil]
        records = [record for record in records if record.subject.casefold() not in subjects]
        if not records:
            raise KtError(f"no demonstrations in {self.pool!r} about other subjects; name a file with demonstrations=")
        texts, kinds = [said(record) for record in records], KINDS[self.kinds]
        by_states = self.retriever == "embeddings"
        retriever: Retriever = Embeddings.of(model, texts, -1.0) if by_states else BM25(texts)
        shown = []
        for fact in facts:
            nearest = retriever.nearest(said(fact))
            nearest += [i for i in range(len(records)) if i not in set(nearest)]
            some = [demonstration(records[i], kinds[n % len(kinds)]) for n, i in enumerate(nearest[: self.shots])]
            shown.append(tuple(reversed(some)))
        return shown


def embedding_of(model: TracedModel) -> str:
    """SHA-256 of the token embedding, which tells models of one config and tokenizer apart."""
    return model.fingerprint([f"{model.layout.embed}.weight"])


def said(fact: Fact) -> str:
    """The fact as a sentence, with its target."""
    return joint_text(fact.prompt, fact.target or "", fact.target_prefix)


def demonstration(record: Fact, kind: str) -> str:
    """A record as one demonstration of a kind; a record that lacks what the kind needs is copied."""
    line = said(record)
    if kind == "update" and record.paraphrases:
        line = joint_text(record.paraphrases[0], record.target or "", record.target_prefix)
    elif kind == "retain" and (near := next((n for n in record.neighbours if n.answer), None)) is not None:
        line = joint_text(near.prompt, near.answer or "", near.target_prefix)
    return f"New Fact: {said(record)}\n{TEMPLATE.replace('{}', line)}\n\n"


def demonstrations(pool: str, model: str) -> list[Fact]:
    """Records to show: `auto` is the demo model's own facts for it, and 16 that ship with kt for all others."""
    if pool != "auto":
        return load_facts(pool)
    return load_facts("demo" if model == "demo" else Path(__file__).with_name("demonstrations.jsonl"))


def fitting(model: TracedModel, shown: Sequence[str], last: str) -> str:
    """Demonstrations and the text behind them, without the first ones that a model has no room for."""
    most = model.most_positions
    texts = list(shown)
    while texts and most is not None and len(token_ids(model.tokenizer, "".join(texts) + last)) > ROOM * most:
        texts.pop(0)
    return "".join(texts) + last
