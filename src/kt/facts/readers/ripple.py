"""RippleEdits: an edit as a sentence, and six families of questions whose answer it must or must not change.

The edit gives only the Wikidata ids of subject and target. Both are parsed from the sentence, whose form follows from
the relation ("The name of the mother of S is T.", "S is followed by T.").
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

from ..fact import Fact, Prompt
from ..record import Choices, Record

CHANGED = ("Logical_Generalization", "Compositionality_I", "Compositionality_II", "Subject_Aliasing")
UNCHANGED = ("Relation_Specificity", "Forgetfulness")
MISSPELT = {"Relation_Specificity": "Relation_Specifity"}
"""The spelling in the paper's repository."""

_KIND = r"(?:(?:country|place|date|field|head) of [a-z]+|[a-z]+(?: [a-z]+)*?)"
_HEAD = (
    r"(?:The .+? which |The number of children |The name of the award "
    rf"|The (?:names? of the )?{_KIND} (?:of|by|in) |)"
)
_TAIL = (
    r"(?: is (?:associated with|part of|the capital of|a member of) is| plays in is| has is| won is"
    r"| is followed by| follows| is| are)"
)
_END = re.compile(_TAIL + r"(?= )")
_STEM = re.compile(rf"(?P<head>{_HEAD})(?P<subject>\S.*?)(?P<tail>{_TAIL})")


def is_edit_sentence(text: str) -> bool:
    """Whether the text reads as an edit's sentence; RippleEdits also has files of these alone."""
    matches = [match for end in _END.finditer(text) if (match := _STEM.fullmatch(text[: end.end()]))]
    return text.endswith(".") and any(m["head"] or m["tail"] in TAILS.values() for m in matches)


TAILS = {"FOLLOWED_BY": " is followed by", "FOLLOWS": " follows", "SIBLING": " are", "SIBLINGS": " are"}
"""How the sentence goes on behind the subject, of relations whose sentences do not all end in "is"."""


class Query(NamedTuple):
    """A question of the benchmark with all accepted answers."""

    prompt: str
    answers: tuple[str, ...]
    subject_id: str | None
    any_of: str = ""


def read_ripple(record: Record, choices: Choices) -> list[Fact]:
    """One fact. The first answer of a test is its answer; other answers and all aliases are other spellings.

    A test with `test_condition` OR is passed by any of its questions. `condition_queries`, which select the tests for a
    model that knows the premises, are not applied.
    """
    edit = record.child("edit", record.data.get("edit"))
    questions = {kind: list(_queries(record, kind)) for kind in (*CHANGED, *UNCHANGED)}
    queries = [query for family in questions.values() for query in family]
    about_subject = [q.prompt for q in queries if q.subject_id and q.subject_id == edit.data.get("subject_id")]
    key = edit.first("original_fact", "previous_fact")
    old = edit.child(key, edit.data[key]).text("prompt", blank_is_none=True) if edit.has(key) else None
    answers = {answer for query in queries for answer in query.answers}
    template, subject, stem = _stem(edit, edit.filled("prompt"), old, about_subject, answers)
    target = _rest(edit.filled("prompt"), stem)
    if not target:
        raise record.junk("empty target")
    fact = Fact(
        template,
        subject,
        answer=_rest(old, stem) if old else None,
        target=target,
        id=record.id("case_id", "id"),
        relation=edit.text("relation", blank_is_none=True) or "",
        neighbours=tuple(_prompt(q, kind) for kind in UNCHANGED for q in questions[kind]),
        hops=tuple(_prompt(q, kind) for kind in CHANGED for q in questions[kind]),
        target_aliases=tuple(dict.fromkeys(a for q in queries if q.answers[0] == target for a in q.answers[1:])),
    )
    return [fact]


def _queries(record: Record, kind: str) -> Iterator[Query]:
    """The questions of one family that have a text and an answer."""
    misspelt = MISSPELT.get(kind, kind)
    for number, test in enumerate(record.children(kind if record.has(kind) else misspelt), 1):
        queries = test.children("test_queries")
        either = len(queries) > 1 and str(test.data.get("test_condition", "")).upper() == "OR"
        for query in queries:
            text = query.text(query.first("prompt", "phrase"), blank_is_none=True)
            answers = query.answers("answers")
            if text and answers:
                subject_id = query.text("subject_id", blank_is_none=True)
                yield Query(text, answers, subject_id, f"{kind} {number}" if either else "")
            else:
                record.notes.append("a question without text or answer, left out")


def _prompt(query: Query, kind: str) -> Prompt:
    return Prompt(query.prompt, query.answers[0], None, kind, query.answers[1:], any_of=query.any_of)


def _stem(
    edit: Record, sentence: str, old: str | None, about_subject: list[str], answers: Collection[str]
) -> tuple[str, str, str]:
    """(template, subject, prompt up to the target) of the edit's sentence.

    "is" may be part of a name, so there may be several candidate stems. Those that do not end as the edit's relation
    does, or do not begin the old fact's sentence too, are wrong. Of the others it is the stem whose rest is an answer
    of a question (both targets may begin alike), then the one whose subject occurs in most questions about the same
    entity (the longest such subject: "This is Us" rather than "This"), then, with an old fact, the longest, and
    without one the first.
    """
    stems = [sentence[: end.end()] for end in _END.finditer(sentence)]
    matches = [match for stem in stems if (match := _STEM.fullmatch(stem))]
    if not matches:
        raise edit.junk("no subject can be read from the edit's sentence")
    tail = TAILS.get(str(edit.data.get("relation", "")).upper().replace(" ", "_"))
    matches = [match for match in matches if tail is None or match["tail"] == tail] or matches
    shared = [match for match in matches if old is not None and f"{old} ".startswith(f"{match.group()} ")]

    def worth(match: re.Match[str]) -> tuple[int, ...]:
        n_asked, length = _support(match["subject"], about_subject)
        is_answer = _rest(sentence, match.group()) in answers
        return is_answer, n_asked, len(match.group()) if shared and not n_asked else length

    best = max(shared or matches, key=worth)
    return best["head"] + "{}" + best["tail"], best["subject"], best.group()


def _support(subject: str, about_subject: list[str]) -> tuple[int, int]:
    count = sum(subject in prompt for prompt in about_subject)
    return count, len(subject) if count else -len(subject)


def _rest(sentence: str, stem: str) -> str | None:
    """The sentence after the stem, without the full stop."""
    return sentence[len(stem) :].strip().removesuffix(".").strip() or None
