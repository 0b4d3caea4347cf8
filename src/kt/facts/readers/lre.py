"""LRE relations: one object per relation, with templates and subject-object pairs; a fact for every pair."""

from __future__ import annotations

from collections import defaultdict
from hashlib import sha256

from ...errors import SubjectNotFound
from ..fact import Fact
from ..record import Record, kind
from .choices import Choices


def read_lre(record: Record, choices: Choices) -> list[Fact]:
    """The first template is the prompt, all others (few-shot and zero-shot ones) are paraphrases.

    A subject with several objects has the other ones as aliases. The foil is another object of the relation that is
    none of the subject's own, picked by a hash of relation and subject, so that it depends on no order and no seed.
    """
    name = record.filled("name")
    template, *others = _templates(record)
    pairs = _pairs(record)
    own: dict[str, list[str]] = defaultdict(list)
    for subject, object in pairs:
        own[subject].append(object)
    objects = sorted({object for _, object in pairs})
    return [
        Fact(
            template,
            subject,
            answer=object,
            foil=_foil(name, subject, own[subject], objects),
            id=f"{name} {number}",
            relation=name,
            rephrasings=tuple(others),
            answer_aliases=tuple(dict.fromkeys(o for o in own[subject] if o != object)),
        )
        for number, (subject, object) in enumerate(pairs, 1)
    ]


def _pairs(record: Record) -> list[tuple[str, str]]:
    samples = record.data.get("samples")
    if not isinstance(samples, list):
        raise record.bad(f"'samples' is {kind(samples)}; it must be a list of objects with subject and object")
    found = (record.child(f"sample {number}", sample) for number, sample in enumerate(samples, 1))
    return [(pair.need("subject"), pair.need("object")) for pair in found]


def _templates(record: Record) -> tuple[str, ...]:
    found = (*record.texts("prompt_templates"), *record.texts("prompt_templates_zs"))
    if not found:
        raise record.missing("prompt_templates")
    for template in found:
        if template.count("{}") != 1:
            raise SubjectNotFound(f"{record.where}: the template {template!r} must hold one {{}} for the subject")
    return tuple(dict.fromkeys(found))


def _foil(relation: str, subject: str, own: list[str], objects: list[str]) -> str | None:
    taken = {o.casefold() for o in own}
    free = [o for o in objects if o.casefold() not in taken]
    pick = int.from_bytes(sha256(f"{relation}\n{subject}".encode()).digest()[:8], "big")
    return free[pick % len(free)] if free else None
