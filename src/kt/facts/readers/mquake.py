"""MQuAKE-CF: one or several edits, and questions whose answer changes once all edits are made."""

from __future__ import annotations

from collections.abc import Iterable

from ..fact import Fact, Prompt
from ..record import Choices, Record, templates


def read_mquake(record: Record, choices: Choices) -> list[Fact]:
    """One fact per edit, in the record's order; the last one has the multi-hop questions.

    The questions' answers hold only when every edit of the record is in the model. On the last fact they are scored
    once (a mean over facts counts no record twice) and after all of the record's edits, in batch and sequential mode.
    """
    rewrites = record.children("requested_rewrite")
    if not rewrites:
        raise record.junk("empty requested_rewrite")
    if isinstance(listed := record.data["requested_rewrite"], list) and len(rewrites) < len(listed):
        raise record.junk("a chain of edits with a blank one, which its questions need")
    name = record.id("case_id", "id")
    hops = chain_questions(record)
    facts = []
    for number, rewrite in enumerate(rewrites, 1):
        subject = rewrite.filled("subject")
        target, *target_aliases = rewrite.filled_answers("target_new")
        answer, aliases = rewrite.answer_and_aliases("target_true")
        fact = Fact(
            rewrite.template(rewrite.prompt("prompt"), subject, filled=False),
            subject,
            answer=answer,
            target=target,
            id=f"{name}-{number}" if name and len(rewrites) > 1 else name,
            relation=rewrite.text("relation_id", blank_is_none=True) or "",
            rephrasings=templates(rewrite.texts("question"), subject),
            hops=hops if number == len(rewrites) else (),
            answer_aliases=_aliases(record, "single_hops", answer, aliases),
            target_aliases=_aliases(record, "new_single_hops", target, target_aliases),
        )
        facts.append(fact)
    return facts


def chain_questions(record: Record) -> tuple[Prompt, ...]:
    """Three wordings of one question; their old answer is the answer of the chain before the edits."""
    answer, *aliases = record.filled_answers("new_answer")
    original, _ = record.answer_and_aliases("answer")
    others = tuple(dict.fromkeys((*aliases, *record.answers("new_answer_alias"))))
    return tuple(Prompt(text, answer, original, "multi_hop", others) for text in record.texts("questions"))


def _aliases(record: Record, key: str, answer: str | None, aliases: Iterable[str]) -> tuple[str, ...]:
    """Other spellings of an answer: its aliases, and the aliases of the chain's single hop with this answer."""
    spellings = dict.fromkeys(aliases)
    for hop in record.children(key):
        if answer and hop.text("answer", blank_is_none=True) == answer:
            spellings.update(dict.fromkeys(hop.answers("answer_alias")))
    return tuple(spelling for spelling in spellings if spelling != answer)
