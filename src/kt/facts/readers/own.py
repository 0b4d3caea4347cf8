"""kt's own records, and edit requests in ROME's and MEMIT's form. Users write these by hand, so none is junk."""

from __future__ import annotations

from difflib import get_close_matches
from functools import lru_cache

from ..fact import Fact, Prompt, template_of
from ..record import NO_ANSWER, Choices, Record, templates

OWN_KEYS = (
    "id", "case_id", "relation", "relation_id", "prompt", "subject", "answer", "foil", "target",
    "paraphrases", "neighbourhood", "portability", "generation", "answer_aliases", "target_aliases", "target_prefix",
)  # fmt: skip

NAMES = {
    "id": ("id", "case_id"),
    "relation": ("relation", "relation_id"),
    "answer": ("answer", "target_true", "target_old", "object"),
    "target": ("target", "target_new"),
    "foil": ("foil", "target_false"),
    "paraphrases": ("paraphrases", "paraphrase_prompts", "rephrase_prompt", "rephrase", "ood_rephrase"),
    "neighbourhood": ("neighbourhood", "neighborhood", "neighborhood_prompts"),
    "generation": ("generation", "generation_prompts"),
}
"""Our keys and other tools' names for them; of several in one record the first is read."""
_OURS = {name: ours for ours, names in NAMES.items() for name in names}

MEANT = {
    "rephrasings": "paraphrases",
    "neighbours": "neighbourhood",
    "neighbors": "neighbourhood",
    "hops": "portability",
    "rephrases": "paraphrases",
    "paraphrased_prompts": "paraphrases",
    "new_target": "target",
    "new_answer": "target",
    "old_answer": "answer",
    "true_answer": "answer",
    "wrong_answer": "foil",
}
"""Other names of a key (those of `Fact` or of other tools) that are not close in spelling."""

LIST_KEYS = ("paraphrases", "neighbourhood", "portability", "generation", "answer_aliases", "target_aliases")
"""The keys that hold lists, for formats that know only texts (CSV)."""


def read_own(record: Record, choices: Choices) -> list[Fact]:
    """kt's own records, also with other tools' keys (`NAMES`)."""
    _check_keys(record)
    key = {ours: record.first(*names) for ours, names in NAMES.items()}
    answer, answer_aliases = _answers(record, key["answer"])
    target, target_aliases = _answers(record, key["target"])
    subject = record.need("subject")
    shared = answer if key["neighbourhood"] == "neighborhood_prompts" else None  # as in CounterFact
    fact = Fact(
        template_of(record.as_prompt("prompt", record.need("prompt")), subject),
        subject,
        answer=answer,
        foil=record.text(key["foil"]),
        target=target,
        id=record.id(key["id"]),
        relation=record.text(key["relation"]) or "",
        rephrasings=templates(record.texts(key["paraphrases"]), subject, filled=False),
        neighbours=tuple(_prompt(c, shared) for c in record.children(key["neighbourhood"])),
        hops=record.answered(_prompt(c) for c in record.children("portability")),
        generation=record.texts(key["generation"]),
        answer_aliases=(*answer_aliases, *record.answers("answer_aliases")),
        target_aliases=(*target_aliases, *record.answers("target_aliases")),
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


def _answers(record: Record, key: str) -> tuple[str | None, tuple[str, ...]]:
    """The first spelling and the others; a blank text is refused."""
    if isinstance(record.data.get(key), list):
        return record.answer_and_aliases(key)
    text = record.text(key)
    if text in NO_ANSWER:
        record.notes.append(f"{key} {text!r}, a special token, is read as none")
        return None, ()
    return text, ()


PROMPT_KEYS = ("prompt", "answer", "original", "kind", "aliases", "target_prefix", "ground_truth")
"""The keys of an entry of `neighbourhood` or `portability`; the last is EasyEdit's name for the answer."""


def _prompt(record: Record, shared: str | None = None) -> Prompt:
    """An entry of `neighbourhood` or `portability`; without an answer it gets the `shared` one."""
    for name in record.data:
        if name not in PROMPT_KEYS and record.has(name):
            near = get_close_matches(str(name).lower(), PROMPT_KEYS, n=1, cutoff=0.75)
            record.notes.append(_unread(name, near[0] if near and not record.has(near[0]) else None))
    answer, aliases = _answers(record, record.first("answer", "ground_truth"))
    return Prompt(
        record.as_prompt("prompt", record.need("prompt")),
        answer or shared,
        record.text("original"),
        record.text("kind", blank_is_none=True) or "",
        (*aliases, *record.texts("aliases")),
        record.prefix(),
    )


def _unread(key: object, near: str | None) -> str:
    return f"unknown key {str(key)[:40]!r}, which is not read" + (f" (did you mean {near!r}?)" if near else "")


def _check_keys(record: Record) -> None:
    """Refuse a key that looks misspelt or says what another one says, and note any other that is not read.

    An ignored key would leave its metric out without a word.
    """
    seen: dict[str, str] = {}
    for key in record.data:
        if not record.has(key):
            continue
        ours = _OURS.get(key, key)
        if ours in seen and ours not in ("id", "relation"):
            raise record.bad(f"{seen[ours]!r} and {key!r} mean the same; leave one out")
        seen[ours] = key
        if ours in OWN_KEYS:
            continue
        meant, near = _meant(str(key))
        if meant is not None and not record.has(meant):
            raise record.bad(f"unknown key {key!r}; did you mean {meant!r}?")
        record.notes.append(_unread(key, near))


def unknown_key(name: str) -> str | None:
    """What to say of a keyword that is no key of a record; None for one that is."""
    if name in OWN_KEYS or name in _OURS:
        return None
    near = MEANT.get(name) or next(iter(get_close_matches(name, [*OWN_KEYS, *_OURS], n=1)), None)
    return f"unknown key {name!r}; " + (f"did you mean {near!r}?" if near else f"there are {', '.join(OWN_KEYS)}")


@lru_cache(maxsize=256)
def _meant(key: str) -> tuple[str | None, str | None]:
    """The key that the user must have meant, and one that is like it. Cached: every record has the same keys."""
    known = (*OWN_KEYS, *_OURS)
    name = key.strip().lower().replace(" ", "_").replace("-", "_")
    sure = MEANT.get(name) or (name if name in known else None)
    sure = sure or next(iter(get_close_matches(name, OWN_KEYS, n=1, cutoff=0.9)), None)
    return sure, next(iter(get_close_matches(name, known, n=1, cutoff=0.8)), None)
