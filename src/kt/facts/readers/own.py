"""kt's own records, and edit requests in ROME's and MEMIT's form. Users write these by hand, so none is junk."""

from __future__ import annotations

from difflib import get_close_matches
from functools import lru_cache

from ..fact import Fact, Prompt, template_of
from ..record import Choices, Record, templates

OWN_KEYS = (
    "id", "case_id", "relation", "relation_id", "prompt", "subject", "answer", "target_true", "foil",
    "target", "target_new", "paraphrases", "neighbourhood", "portability", "generation",
    "answer_aliases", "target_aliases", "target_prefix",
)  # fmt: skip

MEANT = {
    "rephrasings": "paraphrases",
    "neighbours": "neighbourhood",
    "neighbors": "neighbourhood",
    "hops": "portability",
}
"""Other names of a key (those of `Fact` or of other tools) that are not close in spelling."""

LIST_KEYS = ("paraphrases", "neighbourhood", "portability", "generation", "answer_aliases", "target_aliases")
"""The keys that hold lists, for formats that know only texts (CSV)."""


def read_own(record: Record, choices: Choices) -> list[Fact]:
    """kt's own records; `target_new` and `target_true` may stand for `target` and `answer`."""
    _refuse_misspelt(record)
    subject = record.need("subject")
    fact = Fact(
        template_of(record.as_prompt("prompt", record.need("prompt")), subject),
        subject,
        answer=record.text(record.first("answer", "target_true")),
        foil=record.text("foil"),
        target=record.text(record.first("target", "target_new")),
        id=record.id("id", "case_id"),
        relation=record.text(record.first("relation", "relation_id")) or "",
        rephrasings=templates(record.texts("paraphrases"), subject, filled=False),
        neighbours=tuple(_prompt(c) for c in record.children("neighbourhood")),
        hops=tuple(_prompt(c) for c in record.children("portability")),
        generation=record.texts("generation"),
        answer_aliases=record.texts("answer_aliases"),
        target_aliases=record.texts("target_aliases"),
    )
    return [fact]


def read_rome(record: Record, choices: Choices) -> list[Fact]:
    """An edit request in the form of the ROME and MEMIT repositories."""
    subject = record.need("subject")
    fact = Fact(
        template_of(record.as_prompt("prompt", record.need("prompt")), subject),
        subject,
        answer=record.text("target_true"),
        target=record.need("target_new"),
        id=record.id("case_id", "id"),
        relation=record.text("relation_id") or "",
    )
    return [fact]


def _prompt(record: Record) -> Prompt:
    return Prompt(
        record.as_prompt("prompt", record.need("prompt")),
        record.text("answer"),
        record.text("original"),
        record.text("kind", blank_is_none=True) or "",
        record.texts("aliases"),
        record.prefix(),
    )


def _refuse_misspelt(record: Record) -> None:
    """Refuse a key like "paraphrase", which would be ignored silently, so that its metric would be missing."""
    for key in record.data:
        meant = None if key in OWN_KEYS else _meant(str(key))
        if meant is not None and not record.has(meant):
            raise record.bad(f"unknown key {key!r}; did you mean {meant!r}?")


@lru_cache(maxsize=256)
def _meant(key: str) -> str | None:
    """The key that the user may have meant. Cached, since every record has the same keys and the search is slow."""
    if key in MEANT:
        return MEANT[key]
    close = get_close_matches(key, OWN_KEYS, n=1, cutoff=0.9)
    return close[0] if close else None
