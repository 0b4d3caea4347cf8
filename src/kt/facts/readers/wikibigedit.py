"""WikiBigEdit: changes of Wikidata over time as questions, each in other words, as a hop, and beside another fact."""

from __future__ import annotations

from ..fact import Fact, Prompt
from ..record import Choices, Record, templates


def read_wikibigedit(record: Record, choices: Choices) -> list[Fact]:
    """The old answer is unknown. The persona's question and the hop (where there is one) are portability prompts."""
    subject = record.filled("subject")
    target, *aliases = record.filled_answers("ans")
    personas = tuple(Prompt(text, target, kind="personas") for text in record.texts("personas"))
    fact = Fact(
        record.template(record.prompt("update"), subject),
        subject,
        target=target,
        id=record.id("id", "case_id"),
        relation=record.text("relation", blank_is_none=True) or "",
        rephrasings=templates(record.texts("rephrase"), subject),
        neighbours=record.prompts("loc", "loc_ans", "loc"),
        hops=(*personas, *record.answered(record.prompts("mhop", "mhop_ans", "mhop"))),
        target_aliases=tuple(aliases),
    )
    return [fact]
