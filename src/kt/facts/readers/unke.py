"""UnKE and AKEW: answers in whole paragraphs (unstructured editing)."""

from __future__ import annotations

from ..fact import Fact, Prompt
from ..record import Choices, Record, templates
from .mquake import chain_questions

WHOLE = "a record that names no subject: its whole prompt stands for it"


def read_unke(record: Record, choices: Choices) -> list[Fact]:
    """UnKE: the target is a paragraph; the sub-questions are about its parts.

    Most records name no subject. The whole question then stands for it, so the last token of the prompt is edited, as
    UnKE does.
    """
    subject, question = subject_or_whole(record, "question")
    target, *aliases = record.filled_answers("answer")
    fact = Fact(
        question,
        subject,
        target=target,
        id=record.id("id", "case_id"),
        rephrasings=templates(record.texts("para_question"), subject),
        hops=record.answered(record.prompts("sub_question", "sub_answer", "sub_question")),
        target_aliases=tuple(aliases),
    )
    return [fact]


def subject_or_whole(record: Record, key: str) -> tuple[str, str]:
    """(subject, template) of a record that may name no subject; then its whole prompt is the subject."""
    prompt = record.prompt(key)
    if record.has("subject"):
        subject = record.filled("subject")
        return subject, record.template(prompt, subject)
    record.notes.append(WHOLE)
    return prompt, "{}"


def is_akew(record: Record) -> bool:
    """Whether the edits of a CounterFact or MQuAKE record have AKEW's paragraph."""
    rewrite = record.data.get("requested_rewrite")
    first = rewrite[0] if isinstance(rewrite, list) and rewrite else rewrite
    return isinstance(first, dict) and first.get("fact_new_uns") is not None


def read_akew(record: Record, choices: Choices) -> list[Fact]:
    """AKEW's CounterFact, MQuAKE-CF and WikiUpdate: the question of each edit, answered by its paragraph.

    The triples extracted from a paragraph are its portability prompts, with a chain's multi-hop questions on its last
    edit, as in MQuAKE. `--format counterfact` or `mquake` reads the same records' short targets instead.
    """
    key = "requested_rewrite"
    value = record.data.get(key)
    edits = record.children(key) if isinstance(value, list) else [record.child(key, value)]
    name, facts, ends = record.id("case_id", "id"), [], record.has("questions", "new_answer")
    for number, edit in enumerate(edits, 1):
        subject = edit.filled("subject")
        template = edit.template(edit.prompt(edit.first("question", "prompt_full", "prompt")), subject, filled=False)
        answer, aliases = edit.answer_and_aliases("target_true")
        fact = Fact(
            template,
            subject,
            answer=answer,
            target=edit.filled("fact_new_uns"),
            id=f"{name}-{number}" if name and len(edits) > 1 else name,
            relation=edit.text("relation_id", blank_is_none=True) or "",
            rephrasings=templates(record.texts("paraphrase_prompts") if len(edits) == 1 else (), subject),
            neighbours=tuple(Prompt(p, answer, kind="neighborhood") for p in record.texts("neighborhood_prompts")),
            hops=(*_triples(edit), *(chain_questions(record) if ends and number == len(edits) else ())),
            answer_aliases=aliases,
        )
        facts.append(fact)
    if not facts:
        raise record.junk("empty requested_rewrite")
    return facts


def _triples(edit: Record) -> tuple[Prompt, ...]:
    key, prompts = "unsfact_triplets_GPT", []
    for triple in edit.children(key):
        prompt, subject, target = (triple.text(k, blank_is_none=True) for k in ("prompt", "subject", "target"))
        if prompt and subject:
            prompts.append(Prompt(prompt.replace("{}", subject), target, kind="triple"))
        else:
            edit.left_out(key)
    return edit.answered(prompts)
