"""QAEdit: questions of NQ, TriviaQA and SimpleQA with the answer that the model should learn."""

from __future__ import annotations

from ..fact import Fact
from ..record import Choices, Record, templates


def read_qaedit(record: Record, choices: Choices) -> list[Fact]:
    """The old answer is unknown: the data set holds questions that the model answers wrongly."""
    subject = record.filled("subject")
    target, *aliases = record.filled_answers("target")
    fact = Fact(
        record.template(record.prompt("prompt"), subject),
        subject,
        target=target,
        id=record.id("id", "case_id"),
        rephrasings=templates(record.texts("rephrase"), subject),
        neighbours=tuple(p for entry in record.children("locality") for p in entry.prompts("loc", "loc_ans", "loc")),
        target_aliases=tuple(aliases),
    )
    return [fact]
