"""known_1000: facts that GPT-2 XL knows (ROME), also with a flag per model that says whether that model knows them."""

from __future__ import annotations

from ..fact import Fact
from ..record import Choices, Record


def read_known(record: Record, choices: Choices) -> list[Fact]:
    """A fact to trace, with an answer (`attribute`) but without foil and target.

    The key `prompt` is read, not `template`: in four of ten records the prompt is longer than the template. With
    `choices.known_to`, records whose flag for that model is false are left out and counted.
    """
    if choices.known_to is not None and not _known_to(record, choices.known_to):
        raise record.junk(f"not known to {choices.known_to}")
    subject = record.filled("subject")
    fact = Fact(
        record.template(record.prompt("prompt"), subject),
        subject,
        answer=record.filled("attribute"),
        id=record.id("known_id", "id"),
        relation=record.text("relation_id", blank_is_none=True) or "",
    )
    return [fact]


def _known_to(record: Record, model: str) -> bool:
    """The flag of a model, by its full name or by its name without the owner."""
    flags = {name: value for name, value in record.data.items() if isinstance(value, bool)}
    matches = [name for name in flags if name == model] or [name for name in flags if name.split("/")[-1] == model]
    if len(matches) == 1:
        return flags[matches[0]]
    models = ", ".join(str(name)[:60] for name in list(flags)[:20]) or "none"
    raise record.bad(f"no flag says what {model!r} knows; the models with flags are: {models}")
