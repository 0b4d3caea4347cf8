"""known_1000: facts that GPT-2 XL knows (ROME), also with a flag per model that says whether that model knows them."""

from __future__ import annotations

from ..fact import Fact
from ..record import Record
from .choices import Choices


def read_known(record: Record, choices: Choices) -> list[Fact]:
    """A fact to trace: it has an answer (`attribute`) but no contrast and no target.

    The prompt is taken, not `template`: in four of ten records it goes on after the template's words. With
    `choices.known_to`, records whose flag for that model is false are left out and counted.
    """
    if choices.known_to is not None and not _known_to(record, choices.known_to):
        raise record.junk(f"not known to {choices.known_to}")
    subject = record.filled("subject")
    fact = Fact(
        record.template(record.filled("prompt"), subject),
        subject,
        answer=record.filled("attribute"),
        id=record.id("known_id", "id"),
        relation=record.text("relation_id", blank_is_none=True) or "",
    )
    return [fact]


def _known_to(record: Record, model: str) -> bool:
    """The flag of a model, by its whole name or by the part behind the owner."""
    flags = {name: value for name, value in record.data.items() if isinstance(value, bool)}
    found = [name for name in flags if name == model] or [name for name in flags if name.split("/")[-1] == model]
    if len(found) == 1:
        return flags[found[0]]
    there = ", ".join(str(name)[:60] for name in list(flags)[:20]) or "none"
    raise record.bad(f"no flag says what {model!r} knows; the models with flags are: {there}")
