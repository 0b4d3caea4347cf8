"""zsRE in MEND's form: a question, its answers, an alternative answer, a rephrasing and an unrelated question.

Two editing tasks are called zsRE. ROME, MEMIT and JEEP edit the right answer in (`answers[0]`; the old answer is
whatever the model says); EasyEdit edits in the wrong one (`alt`, with `answers[0]` as the old answer).
"""

from __future__ import annotations

from ..fact import Fact, Prompt
from ..record import Record, templates
from .choices import Choices
from .easyedit import one_hop


def read_zsre(record: Record, choices: Choices) -> list[Fact]:
    """A MEND record, with EasyEdit's one-hop portability question where it is there."""
    subject = record.filled("subject")
    if choices.zsre_target == "alt":
        target, *target_aliases = record.filled_answers("alt")
        answer, *answer_aliases = _first_filled(record)
    else:
        target, *target_aliases = _first_filled(record)
        answer, answer_aliases = None, []
    fact = Fact(
        record.template(record.filled("src"), subject),
        subject,
        answer=answer,
        target=target,
        id=record.id("case_id", "id"),
        rephrasings=templates(record.texts("rephrase"), subject),
        neighbours=_neighbour(record),
        hops=one_hop(record),
        answer_aliases=tuple(answer_aliases),
        target_aliases=tuple(target_aliases),
    )
    return [fact]


def _first_filled(record: Record) -> tuple[str, ...]:
    """The right answer is `answers[0]`; where that is blank, another spelling must not slip into its place."""
    answers = record.data.get("answers")
    if isinstance(answers, list) and answers and isinstance(answers[0], str) and not answers[0].strip():
        raise record.junk("empty answers")
    return record.filled_answers("answers")


def _neighbour(record: Record) -> tuple[Prompt, ...]:
    """The unrelated question stands as "nq question: who ..." without the question mark it was asked with."""
    answers = record.answers("loc_ans")
    first, others = (answers[0], answers[1:]) if answers else (None, ())
    asked = (text if text.endswith("?") else f"{text}?" for text in record.texts("loc"))
    return tuple(Prompt(text, first, None, "nq_question", others) for text in asked)
