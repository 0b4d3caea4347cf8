"""LRE relations: one object per relation, with templates and subject-object pairs; a fact for every pair."""

from __future__ import annotations

from collections import defaultdict
from hashlib import sha256

from ...errors import SubjectNotFound
from ..fact import Fact, n_places
from ..record import Choices, Record, kind


def read_lre(record: Record, choices: Choices) -> list[Fact]:
    """The first template is the prompt; all others (few-shot and zero-shot) are paraphrases.

    If a subject has several objects, the others are aliases. The foil is an object of the relation that the subject
    does not have; a hash of relation and subject selects it, so it depends on neither order nor seed.
    """
    name = record.filled("name")
    template, *others = _templates(record)
    pairs = _pairs(record)
    by_subject: dict[str, list[str]] = defaultdict(list)
    for subject, object in pairs:
        by_subject[subject].append(object)
    objects = sorted({object for _, object in pairs})
    return [
        Fact(
            template,
            subject,
            answer=object,
            foil=_foil(name, subject, by_subject[subject], objects),
            id=f"{name} {number}",
            relation=name,
            rephrasings=tuple(others),
            answer_aliases=tuple(dict.fromkeys(o for o in by_subject[subject] if o != object)),
        )
        for number, (subject, object) in enumerate(pairs, 1)
    ]


def _pairs(record: Record) -> list[tuple[str, str]]:
    samples = record.data.get("samples")
    if not isinstance(samples, list):
        raise record.bad(f"'samples' is {kind(samples)}; it must be a list of objects with subject and object")
    pairs = []
    for number, value in enumerate(samples, 1):
        sample = record.child(f"sample {number}", value)
        for key in ("subject", "object"):
            if key not in sample.data:
                raise sample.missing(key)
        subject, object = (sample.text(key, blank_is_none=True) for key in ("subject", "object"))
        pairs += [(subject, object)] if subject and object else []
    record.left_out("samples", len(samples) - len(pairs))
    return pairs


def _templates(record: Record) -> tuple[str, ...]:
    texts = (*record.texts("prompt_templates"), *record.texts("prompt_templates_zs"))
    if not texts:
        raise record.missing("prompt_templates")
    for template in texts:
        if n_places(template) != 1:
            raise SubjectNotFound(f"{record.where}: the template {template!r} must hold one {{}} for the subject")
    return tuple(dict.fromkeys(texts))


def _foil(relation: str, subject: str, right: list[str], objects: list[str]) -> str | None:
    folded = {o.casefold() for o in right}
    wrong = [o for o in objects if o.casefold() not in folded]
    number = int.from_bytes(sha256(f"{relation}\n{subject}".encode()).digest()[:8], "big")
    return wrong[number % len(wrong)] if wrong else None
