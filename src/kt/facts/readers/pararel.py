"""ParaRel: the T-REx facts of a relation in many wordings. Its patterns and its facts lie in different files."""

from __future__ import annotations

from ..fact import Fact
from ..record import Choices, Record

SUBJECT, OBJECT = "[X]", "[Y]"


class Patterns:
    """The patterns met so far, by relation."""

    def __init__(self) -> None:
        self.by_relation: dict[str, list[str]] = {}

    def take(self, record: Record, stem: str) -> bool:
        """Keep a record's pattern, if it is one; `stem` is its file's name, by which ParaRel names the relation.

        Only patterns that end in the object can be continued by a model from left to right.
        """
        key = record.first("pattern", "template")
        text = record.data.get(key)
        if not isinstance(text, str) or SUBJECT not in text or OBJECT not in text or record.has("sub_label"):
            return False
        relation = record.text(record.first("predicate_id", "relation"), blank_is_none=True) or stem
        template, behind = (part.strip() for part in text.split(OBJECT, 1))
        known = self.by_relation.setdefault(relation, [])
        if not behind.strip(" .?!") and template.count(SUBJECT) == 1:
            known.append(template.replace(SUBJECT, "{}"))
        return True

    def given_to(self, record: Record, stem: str) -> Record:
        """A T-REx record with its relation's wordings under `patterns`."""
        relation = record.text("predicate_id", blank_is_none=True) or stem
        patterns = list(dict.fromkeys(self.by_relation.get(relation, ())))
        return Record({"predicate_id": relation, **record.data, "patterns": patterns}, record.where, record.notes)


def read_pararel(record: Record, choices: Choices) -> list[Fact]:
    """A fact to trace, without target: the first wording that ends in the object is the prompt."""
    templates = record.texts("patterns")
    relation = record.text("predicate_id", blank_is_none=True) or ""
    if not templates:
        raise record.bad(
            f"no wording of relation {relation!r} that ends in [Y]; give a folder that holds ParaRel's patterns "
            "(graphs_json, or LAMA's relations.jsonl) and the T-REx files"
        )
    fact = Fact(
        templates[0],
        record.filled("sub_label"),
        answer=record.filled("obj_label"),
        id=record.id("uuid", "id"),
        relation=relation,
        rephrasings=templates[1:],
    )
    return [fact]
