"""The formats a fact may be written in: a table of readers, one function each, chosen by a record's keys.

A further data set is one more reader and one more row in `FORMATS`. Readers take a `Record`, which names its
place in every error, and return a `Fact`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from ..errors import BadFact, KtError
from .fact import Fact, Prompt, template_of
from .record import Record, kind, names


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
        raise BadFact(f"{where}: a record must be an object with a prompt and a subject, not {kind(value)}")
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
    raise record.bad(f"the keys {names(record.data)} fit no known format: {formats}")


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
    fact = read_rome(record.child("requested_rewrite", record.data.get("requested_rewrite")))
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
"""In the order of sniffing. A plain ROME request has no mark of its own; the `kt` reader takes it."""

OWN_KEYS = (
    "id", "case_id", "relation", "relation_id", "prompt", "subject", "answer", "target_true", "foil",
    "target", "target_new", "paraphrases", "neighbourhood", "portability", "generation",
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
            entry = record.child(f"{key} {name!r}", item)
            texts, answers = entry.texts("prompt"), entry.data.get("ground_truth")
            if not isinstance(answers, list) or len(texts) == 1:
                answers = [answers] * len(texts)
            if len(answers) != len(texts):
                raise entry.bad(f"{len(texts)} prompts but {len(answers)} ground truths; give one for each")
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
        raise record.bad(f"the id is {kind(value)}; it must be a text or a whole number")
    return "" if value is None else record.clean("id", str(value))


def _checked(fact: Fact, record: Record) -> Fact:
    """An answer equal to its own contrast makes editing and eq. 8 empty."""
    for name, other in (("target", fact.target), ("foil", fact.foil)):
        if other is not None and other == fact.answer:
            raise record.bad(f"the {name} {other!r} is the same as the old answer; give a different one")
    return fact


def _refuse_misspelt(record: Record) -> None:
    """A key like "paraphrase" would be passed over in silence and its metric be missing."""
    for key in record.data:
        close = get_close_matches(str(key), OWN_KEYS, n=1, cutoff=0.9)
        if key not in OWN_KEYS and close and not record.has(close[0]):
            raise record.bad(f"unknown key {key!r}; did you mean {close[0]!r}?")
