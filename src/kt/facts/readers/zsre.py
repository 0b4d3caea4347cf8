"""zsRE in MEND's form: a question, its answers, an alternative answer, a rephrasing and an unrelated question.

Two editing tasks are called zsRE. ROME, MEMIT and JEEP edit in the right answer (`answers[0]`; the old answer is
the model's); EasyEdit edits in a wrong one (`alt`; the old answer is `answers[0]`).
"""

from __future__ import annotations

from dataclasses import replace

from ..fact import Fact, Prompt
from ..record import Choices, Record, templates
from .easyedit import groups


def read_zsre(record: Record, choices: Choices) -> list[Fact]:
    """A MEND record, with EasyEdit's and Bi-ZsRE's portability questions if present.

    Those follow from `alt` (919 of the 1,037 that EasyEdit publishes), so they are read only where `alt` is edited in.
    """
    subject = record.filled("subject")
    if choices.zsre_target == "alt":
        target, *target_aliases = record.filled_answers("alt")
        answer, *answer_aliases = _first_filled(record)
    else:
        target, *target_aliases = _first_filled(record)
        answer, answer_aliases = None, []
    fact = Fact(
        record.template(record.prompt("src"), subject),
        subject,
        answer=answer,
        target=target,
        id=record.id("case_id", "id"),
        rephrasings=templates(record.texts("rephrase"), subject),
        # The unrelated question is written as "nq question: who ..." without its question mark.
        neighbours=(
            *(
                replace(prompt, prompt=prompt.prompt if prompt.prompt.endswith("?") else f"{prompt.prompt}?")
                for prompt in record.prompts("loc", "loc_ans", "nq_question")
            ),
            *groups(record, "locality"),
        ),
        hops=_hops(record, choices),
        answer_aliases=tuple(answer_aliases),
        target_aliases=tuple(target_aliases),
    )
    return [fact]


def _hops(record: Record, choices: Choices) -> tuple[Prompt, ...]:
    hops = record.answered((*groups(record, "portability"), *record.prompts("port", "port_ans", "port")))
    if hops and choices.zsre_target != "alt":
        record.notes.append("portability that follows from `alt`, left out (--zsre-target alt keeps it)")
        return ()
    return hops


def _first_filled(record: Record) -> tuple[str, ...]:
    """The spellings of the right answer, `answers[0]` first; a blank `answers[0]` must not be replaced by another."""
    answers = record.data.get("answers")
    if isinstance(answers, list) and answers and isinstance(answers[0], str) and not answers[0].strip():
        raise record.junk("empty answers")
    return record.filled_answers("answers")
