"""QAEdit: questions of NQ, TriviaQA and SimpleQA with the answer that the model should learn."""

from __future__ import annotations

from ..fact import Fact, Prompt
from ..record import Record, templates
from .choices import Choices


def read_qaedit(record: Record, choices: Choices) -> list[Fact]:
    """The old answer is not known: the data set asks what the model gets wrong."""
    subject = record.filled("subject")
    target, *aliases = record.filled_answers("target")
    fact = Fact(
        record.template(record.filled("prompt"), subject),
        subject,
        target=target,
        id=record.id("id", "case_id"),
        rephrasings=templates(record.texts("rephrase"), subject),
        neighbours=tuple(p for entry in record.children("locality") for p in _neighbours(entry)),
        target_aliases=tuple(aliases),
    )
    return [fact]


def _neighbours(entry: Record) -> tuple[Prompt, ...]:
    answers = entry.answers("loc_ans")
    first, others = (answers[0], answers[1:]) if answers else (None, ())
    return tuple(Prompt(text, first, None, "loc", others) for text in entry.texts("loc"))
