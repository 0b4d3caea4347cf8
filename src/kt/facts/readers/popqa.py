"""PopQA: questions about entities of very different popularity, with all accepted answers."""

from __future__ import annotations

import json

from ..fact import Fact
from ..record import Choices, Record


def read_popqa(record: Record, choices: Choices) -> list[Fact]:
    """A fact to trace: `obj` is the answer, the other accepted ones are aliases; there is no target."""
    subject = record.filled("subj")
    answer, *others = record.filled_answers("obj")
    listed = record.data.get("possible_answers")
    if isinstance(listed, str):  # the published table has JSON in this column
        try:
            listed = json.loads(listed)
        except ValueError:
            listed = [listed]
    accepted = Record({"possible_answers": listed}, record.where, record.notes).answers("possible_answers")
    fact = Fact(
        record.template(record.prompt("question"), subject),
        subject,
        answer=answer,
        id=record.id("id"),
        relation=record.text("prop", blank_is_none=True) or "",
        answer_aliases=tuple(dict.fromkeys(text for text in (*others, *accepted) if text != answer)),
    )
    return [fact]
