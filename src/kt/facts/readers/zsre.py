"""zsRE in MEND's form: a question, its answers, an alternative answer, a rephrasing and an unrelated question.

Two editing tasks are called zsRE. ROME, MEMIT and JEEP edit in the right answer (`answers[0]`; the old answer is
the model's); EasyEdit edits in a wrong one (`alt`; the old answer is `answers[0]`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ...errors import KtError
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
                replace(prompt, prompt=prompt.prompt if prompt.prompt.endswith(("?", "？")) else f"{prompt.prompt}?")
                for prompt in record.prompts("loc", "loc_ans", "nq_question")
            ),
            *groups(record, "locality"),
        ),
        hops=_hops(record, choices),
        answer_aliases=tuple(answer_aliases),
        target_aliases=tuple(target_aliases),
    )
    return [fact]


def by_language(record: Record) -> dict[str, Record]:
    """The parts of a Bi-ZsRE (or MzsRE) record by language: a zsRE record each."""
    parts = {key: value for key, value in record.data.items() if isinstance(value, Mapping) and "src" in value}
    return {key: record.child(key, value) for key, value in parts.items()}


def read_bizsre(record: Record, choices: Choices, source: str = "en") -> list[Fact]:
    """Bi-ZsRE's test records: one language's `alt` is edited in, and every language is asked.

    The other languages' questions have answers of their own, so they are consequences: `edit_zh` (its `src`),
    `rephrase_zh`, `One_Hop_zh`; its unrelated question is a neighbour, `nq_question_zh`.

    Source: `bizsre_test.json` as Wang et al. 2023 (arXiv 2309.08952) describe it, and the keys that their code reads.
    """
    parts, choices = by_language(record), choices._replace(zsre_target="alt")
    if source not in parts:
        raise record.junk(f"no {source!r} part")
    (fact,) = read_zsre(parts.pop(source), choices)
    hops, neighbours = list(fact.hops), list(fact.neighbours)
    for language, part in parts.items():
        try:
            (other,) = read_zsre(part, choices)
        except KtError:  # a translation may lack what an edit needs, as its subject
            record.notes.append(f"the {language!r} part, which is no whole record of its own, left out")
            continue
        asked = [Prompt(other.prompt, other.target, other.answer, "edit", other.target_aliases)]
        asked += [replace(asked[0], prompt=text, kind="rephrase") for text in other.paraphrases]
        hops += _of(language, (*asked, *other.hops))
        neighbours += _of(language, other.neighbours)
    return [replace(fact, id=record.id("case_id", "id") or fact.id, hops=tuple(hops), neighbours=tuple(neighbours))]


def _of(language: str, prompts: Iterable[Prompt]) -> list[Prompt]:
    return [replace(prompt, kind=f"{prompt.kind}_{language}") for prompt in prompts]


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
