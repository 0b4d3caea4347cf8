"""MQuAKE-CF: one or several edits, and questions whose answer changes once all of them are made."""

from __future__ import annotations

from ..fact import Fact, Prompt
from ..record import Record, templates
from .choices import Choices


def read_mquake(record: Record, choices: Choices) -> list[Fact]:
    """One fact per edit, in the record's order; the last one carries the multi-hop questions.

    The questions hold only when every edit of the record is in the model. On the last fact they are asked once (a mean
    over facts counts no record twice), and after all of the record's edits, in batch as in sequential mode.
    """
    rewrites = record.children("requested_rewrite")
    if not rewrites:
        raise record.junk("empty requested_rewrite")
    name = record.id("case_id", "id")
    hops = _questions(record)
    facts = []
    for number, rewrite in enumerate(rewrites, 1):
        subject = rewrite.filled("subject")
        target, *target_aliases = rewrite.filled_answers("target_new")
        answers = rewrite.answers("target_true")
        fact = Fact(
            rewrite.template(rewrite.filled("prompt"), subject),
            subject,
            answer=answers[0] if answers else None,
            target=target,
            id=f"{name}-{number}" if name and len(rewrites) > 1 else name,
            relation=rewrite.text("relation_id", blank_is_none=True) or "",
            rephrasings=templates(rewrite.texts("question"), subject),
            hops=hops if number == len(rewrites) else (),
            answer_aliases=_aliases(record, "single_hops", answers),
            target_aliases=_aliases(record, "new_single_hops", (target, *target_aliases)),
        )
        facts.append(fact)
    return facts


def _questions(record: Record) -> tuple[Prompt, ...]:
    """Three wordings of one question; their old answer is the chain's before the edits."""
    answer, *aliases = record.filled_answers("new_answer")
    before = record.answers("answer")
    others = tuple(dict.fromkeys((*aliases, *record.answers("new_answer_alias"))))
    original = before[0] if before else None
    return tuple(Prompt(text, answer, original, "multi_hop", others) for text in record.texts("questions"))


def _aliases(record: Record, key: str, answers: tuple[str, ...]) -> tuple[str, ...]:
    """Other spellings of an answer: its own, and those of the single hop of the chain that ends in it."""
    found = dict.fromkeys(answers[1:])
    for hop in record.children(key):
        if answers and hop.text("answer", blank_is_none=True) == answers[0]:
            found.update(dict.fromkeys(hop.answers("answer_alias")))
    return tuple(a for a in found if a != answers[0])
