"""HalluEditBench: questions that a model answers wrongly, as CSV, with questions of five kinds about each."""

from __future__ import annotations

from ..fact import Fact, Prompt
from ..record import Choices, Record, templates

N_HOPS = range(2, 7)


def read_hallueditbench(record: Record, choices: Choices) -> list[Fact]:
    """The right object is the target, and the model's answer, in the column `output_MODEL`, the old one.

    Portability are the questions of several hops, those with yes or no, and the reversed relation. The multiple-choice
    questions are not read, since their answer is a letter. Locality questions have no answer.
    """
    subject = record.filled("subject")
    target, *aliases = record.filled_answers("object")
    outputs = [key for key in record.data if str(key).startswith("output_")]
    answer = record.text(outputs[0], blank_is_none=True) if len(outputs) == 1 else None
    hops = [p for n in N_HOPS for p in record.prompts(f"question_{n}hop", f"answer_{n}hop", f"{n}_hops")]
    hops += [Prompt(text, "Yes", kind="yes_question") for text in record.texts("yes_question")]
    hops += [Prompt(text, "No", kind="no_question") for text in record.texts("no_question")]
    hops += [Prompt(text, subject, kind="reversed_relation") for text in record.texts("reversed_relation_question")]
    fact = Fact(
        record.template(record.prompt("question"), subject),
        subject,
        answer=answer,
        target=target,
        id=record.id("id", "case_id"),
        relation=record.text("relation", blank_is_none=True) or "",
        rephrasings=templates(record.texts("paraphrased_question"), subject),
        neighbours=tuple(Prompt(text, kind="locality") for text in record.texts("locality_question")),
        hops=record.answered(hops),
        target_aliases=tuple(aliases),
    )
    return [fact]
