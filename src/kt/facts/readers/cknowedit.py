"""CKnowEdit: Chinese facts, words and reasoning that models get wrong."""

from __future__ import annotations

from collections.abc import Mapping

from ..fact import Fact
from ..record import Choices, Record, templates
from .easyedit import groups
from .unke import subject_or_whole


def is_cknowedit(record: Record) -> bool:
    """Whether the record has an old and a new target, and its portability or locality are lists of pairs, or empty
    where it names no subject."""
    keys = [key for key in ("portability", "locality") if key in record.data]
    pairs = [entry for key in keys for entry in _listed(record, key)]
    empty = keys and not any(map(record.data.get, keys)) and not record.has("subject")
    is_pair = any(isinstance(p, Mapping) and "answer" in p for p in pairs)
    return record.has("target_old", "target_new") and bool(empty or is_pair)


def read_cknowedit(record: Record, choices: Choices) -> list[Fact]:
    """The model's wrong answer is the old one. Where no subject is named, the whole prompt stands for it."""
    subject, template = subject_or_whole(record, "prompt")
    target, *aliases = record.filled_answers("target_new")
    answer, answer_aliases = record.answer_and_aliases("target_old")
    fact = Fact(
        template,
        subject,
        answer=answer,
        target=target,
        id=record.id("id", "case_id"),
        rephrasings=templates(record.texts("rephrase"), subject),
        neighbours=groups(record, "locality"),
        hops=record.answered(groups(record, "portability")),
        answer_aliases=answer_aliases,
        target_aliases=tuple(aliases),
    )
    return [fact]


def _listed(record: Record, key: str) -> list[object]:
    value = record.data.get(key)
    return value if isinstance(value, list) else []
