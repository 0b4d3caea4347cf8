"""ConflictEdit and RoundEdit ("Unveiling the Pitfalls of Knowledge Editing"): edits as Wikidata triples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..fact import Fact
from ..record import Choices, Record


def is_conflict(record: Record) -> bool:
    """Whether the record has ConflictEdit's pair of edits or RoundEdit's single one."""
    edits = record.data.get("edits")
    first = edits[0] if isinstance(edits, list) and edits else record.data.get("edit")
    return isinstance(first, Mapping) and "new_object" in first


def read_conflict(record: Record, choices: Choices) -> list[Fact]:
    """A fact for each edit, in the record's order: ConflictEdit applies two that contradict each other.

    RoundEdit's `true_objects` are right answers too, so the others are aliases of the old answer.
    """
    several = record.has("edits")
    edits = record.children("edits") if several else [record.child("edit", record.data.get("edit"))]
    name = record.id("case_id", "id")
    return [
        _fact(record, edit, f"{name}-{number}" if name and len(edits) > 1 else name)
        for number, edit in enumerate(edits, 1)
    ]


def _fact(record: Record, edit: Record, name: str) -> Fact:
    relation = edit.child("relation", edit.data.get("relation"))
    subject, answer, target = (_label(edit, key) for key in ("subject", "object", "new_object"))
    others = [label for entry in record.children("true_objects") for label in entry.answers("label")]
    return Fact(
        relation.template(relation.prompt("prompt"), subject, filled=False),
        subject,
        answer=answer,
        target=target,
        id=name,
        relation=relation.text("id", blank_is_none=True) or "",
        rephrasings=relation.texts("query"),
        answer_aliases=tuple(dict.fromkeys(other for other in others if other != answer)),
    )


def _label(edit: Record, key: str) -> str:
    value: Any = edit.data.get(key)
    return edit.child(key, value).filled("label")
