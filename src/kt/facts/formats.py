"""The formats a fact may be written in: a table of readers, one function each, chosen by a record's keys.

A further data set is one more reader and one more row in `FORMATS`. Readers take a `Record`, which names its place
in every error, and return a `Fact`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple, NoReturn

from ..errors import BadFact, KtError
from .fact import Fact, Prompt, template_of


@dataclass(frozen=True)
class Record:
    """A JSON object with a place; null values count as absent, as data frames write them."""

    data: Mapping[str, Any]
    where: str

    def fail(self, why: str) -> NoReturn:
        raise BadFact(f"{self.where}: {why}")

    def has(self, key: str) -> bool:
        return self.data.get(key) is not None

    def first(self, *keys: str) -> str:
        """The first of the keys that is present (for names that formats spell differently)."""
        return next((k for k in keys if self.has(k)), keys[0])

    def need(self, key: str) -> str:
        """A text that must be there."""
        if not self.has(key):
            self.fail(f"{key!r} is missing; the record has {_names(self.data)}")
        text = self.text(key)
        return text if text is not None else self.fail(f"{key!r} is missing")

    def text(self, key: str, blank_is_none: bool = False) -> str | None:
        """A text, ends stripped; also {"str": text}, as ROME writes targets, and the first of a list of aliases."""
        value = self.data.get(key)
        if isinstance(value, Mapping) and "str" in value:
            value = value["str"]
        while isinstance(value, list) and value:
            value = value[0]
        if value is None or (value == [] and blank_is_none):
            return None
        if not isinstance(value, str):
            self.fail(f"{key!r} is {_kind(value)}; it must be a text")
        text = self.clean(key, value)
        if not text and not blank_is_none:
            self.fail(f"{key!r} is empty; write a text or leave the key out")
        return text or None

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts (or one text alone); blank ones are left out."""
        values = self.data.get(key)
        values = [] if values is None else values if isinstance(values, list) else [values]
        for value in values:
            if not isinstance(value, str):
                self.fail(f"{key!r} holds {_kind(value)}; it must be a text or a list of texts")
        return tuple(t for t in (self.clean(key, v) for v in values) if t)

    def clean(self, key: str, value: str) -> str:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            self.fail(f"{key!r} holds half of a surrogate pair (\\ud800-\\udfff), which no tokenizer reads")
        return value.strip()

    def children(self, key: str) -> list[Record]:
        """A list of objects; a text alone stands for {"prompt": text}."""
        values = self.data.get(key)
        if values is None:
            return []
        if not isinstance(values, list):
            self.fail(f"{key!r} is {_kind(values)}; it must be a list of objects with prompt and answer")
        return [self.child(key, {"prompt": v} if isinstance(v, str) else v) for v in values]

    def child(self, key: str, value: Any) -> Record:
        if not isinstance(value, Mapping):
            self.fail(f"{key!r} holds {_kind(value)}; it must be an object")
        return Record(value, f"{self.where}, {key}")


class Format(NamedTuple):
    """`marks`: any of these keys shows the format; `keys`: what an error message tells about it."""

    marks: frozenset[str]
    keys: str
    read: Callable[[Record], Fact]


def read_record(value: Any, where: str, format: str | None = None) -> Fact:
    """One fact from one JSON value.

    Raises:
        BadFact, SubjectNotFound: with the place, what was found and what was looked for.
    """
    if not isinstance(value, Mapping):
        raise BadFact(f"{where}: a record must be an object with a prompt and a subject, not {_kind(value)}")
    record = Record(value, where)
    if format is not None and format not in FORMATS:
        raise BadFact(f"unknown format {format!r}; there are {', '.join(FORMATS)}")
    try:
        return _checked(FORMATS[format or sniff(record)].read(record), record)
    except KtError as error:
        raise error if str(error).startswith(where) else type(error)(f"{where}: {error}") from None


def sniff(record: Record) -> str:
    """The name of the first format whose marks are among the record's keys."""
    for name, known in FORMATS.items():
        if any(record.has(key) for key in known.marks):
            return name
    formats = "; ".join(f"{name} ({known.keys})" for name, known in FORMATS.items())
    record.fail(f"the keys {_names(record.data)} fit no known format: {formats}")


def read_own(record: Record) -> Fact:
    """Our own records; `target_new` and `target_true` serve for `target` and `answer`."""
    _refuse_misspelt(record)
    subject = record.need("subject")
    return Fact(
        template_of(record.need("prompt"), subject),
        subject,
        answer=record.text(record.first("answer", "target_true")),
        foil=record.text("foil"),
        target=record.text(record.first("target", "target_new")),
        id=_id(record, "id", "case_id"),
        relation=record.text(record.first("relation", "relation_id")) or "",
        rephrasings=_templates(record.texts("paraphrases"), subject),
        neighbours=tuple(_own_prompt(c) for c in record.children("neighbourhood")),
        hops=tuple(_own_prompt(c) for c in record.children("portability")),
        generation=record.texts("generation"),
    )


def read_rome(record: Record) -> Fact:
    """An edit request as the ROME and MEMIT repositories write it."""
    subject = record.need("subject")
    return Fact(
        template_of(record.need("prompt"), subject),
        subject,
        answer=record.text("target_true"),
        target=record.need("target_new"),
        id=_id(record, "case_id", "id"),
        relation=record.text("relation_id") or "",
    )


def read_counterfact(record: Record) -> Fact:
    """A CounterFact record: a ROME request with prompts around it.

    Neighbours share the true answer of the edited fact, by the data set's construction.
    """
    rewrite = record.child("requested_rewrite", record.data["requested_rewrite"] if record.has("requested_rewrite") else {})
    fact = read_rome(rewrite)
    return Fact(
        fact.template,
        fact.subject,
        answer=fact.answer,
        target=fact.target,
        id=_id(record, "case_id"),
        relation=fact.relation,
        rephrasings=_templates(record.texts("paraphrase_prompts"), fact.subject),
        neighbours=tuple(Prompt(text, fact.answer) for text in record.texts("neighborhood_prompts")),
        generation=record.texts("generation_prompts"),
    )


def read_easyedit(record: Record) -> Fact:
    """EasyEdit's flat request: locality and portability are {key: {prompt, ground_truth}}, or flat keys."""
    subject = record.need("subject")
    flat = [Prompt(text, record.text("locality_ground_truth", True)) for text in record.texts("locality_prompt")]
    return Fact(
        template_of(record.need("prompt"), subject),
        subject,
        answer=record.text("ground_truth", blank_is_none=True),
        target=record.need("target_new"),
        id=_id(record, "case_id", "id"),
        relation=record.text(record.first("relation", "relation_id")) or "",
        rephrasings=_templates(record.texts("rephrase_prompt"), subject),
        neighbours=(*flat, *_easyedit_prompts(record, "locality")),
        hops=_easyedit_prompts(record, "portability"),
    )


FORMATS: dict[str, Format] = {
    "counterfact": Format(
        frozenset({"requested_rewrite"}),
        "requested_rewrite, paraphrase_prompts, neighborhood_prompts",
        read_counterfact,
    ),
    "easyedit": Format(
        frozenset({"ground_truth", "rephrase_prompt", "locality", "locality_prompt"}),
        "prompt, subject, target_new, ground_truth, rephrase_prompt, locality, portability",
        read_easyedit,
    ),
    "rome": Format(frozenset(), "prompt, subject, target_new, target_true", read_rome),
    "kt": Format(
        frozenset({"prompt"}),
        "prompt, subject, answer, foil, target, paraphrases, neighbourhood, portability, generation",
        read_own,
    ),
}
"""In the order of sniffing. A plain ROME request has no mark of its own: the `kt` reader takes it as it is."""

OWN_KEYS = (
    "id", "case_id", "relation", "relation_id", "prompt", "subject", "answer", "target_true", "foil", "target",
    "target_new", "paraphrases", "neighbourhood", "portability", "generation",
)  # fmt: skip


def _own_prompt(record: Record) -> Prompt:
    return Prompt(record.need("prompt"), record.text("answer"), record.text("original"))


def _easyedit_prompts(record: Record, key: str) -> tuple[Prompt, ...]:
    """{name: {prompt, ground_truth}}, each a text or parallel lists of texts, or {name: [{...}, ...]}."""
    value = record.data.get(key)
    if value is None:
        return ()
    prompts: list[Prompt] = []
    for name, group in record.child(key, value).data.items():
        for item in group if isinstance(group, list) else [group] if group is not None else []:
            entry = record.child(f"{key} {name}", item)
            texts, answers = entry.texts("prompt"), entry.data.get("ground_truth")
            if not isinstance(answers, list) or len(texts) == 1:
                answers = [answers] * len(texts)
            if len(answers) != len(texts):
                entry.fail(f"{len(texts)} prompts but {len(answers)} ground truths; give one for each")
            for text, answer in zip(texts, answers, strict=True):
                one = Record({"ground_truth": answer}, entry.where)
                prompts.append(Prompt(text, one.text("ground_truth", blank_is_none=True)))
    return tuple(prompts)


def _templates(texts: tuple[str, ...], subject: str) -> tuple[str, ...]:
    """Full prompts as templates where they name the subject; others stay as they are."""
    return tuple(template_of(t, subject) if subject in t else t for t in texts)


def _id(record: Record, *keys: str) -> str:
    """An id may be a number."""
    value = record.data.get(record.first(*keys))
    if isinstance(value, bool) or not isinstance(value, int | str | None):
        record.fail(f"the id is {_kind(value)}; it must be a text or a whole number")
    return "" if value is None else record.clean("id", str(value))


def _checked(fact: Fact, record: Record) -> Fact:
    """An answer equal to its own contrast makes editing and eq. 8 empty."""
    for name, other in (("target", fact.target), ("foil", fact.foil)):
        if other is not None and other == fact.answer:
            record.fail(f"the {name} {other!r} is the same as the old answer; give a different one")
    return fact


def _refuse_misspelt(record: Record) -> None:
    """A key like "paraphrase" would be passed over in silence and its metric be missing."""
    for key in record.data:
        close = get_close_matches(str(key), OWN_KEYS, n=1, cutoff=0.9)
        if key not in OWN_KEYS and close and not record.has(close[0]):
            record.fail(f"unknown key {key!r}; did you mean {close[0]!r}?")


def _names(data: Mapping[str, Any]) -> str:
    """The keys for a message: quoted, at most ten of them, each at most 40 characters."""
    keys = [repr(str(k)[:40]) for k in list(data)[:10]]
    return ", ".join(keys) + (f" and {len(data) - 10} more" if len(data) > 10 else "") if keys else "(none)"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
