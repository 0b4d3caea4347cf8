"""A record on its way to becoming a fact: typed reading of its keys, with its place in every error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import BadFact, SubjectNotFound
from .fact import template_of


class Junk(BadFact):
    """A record that its own data set is known to have and that nobody edits: counted and left out, not an error.

    `reason` has no place in it, so that records left out for the same reason are counted together.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Record:
    """A JSON object with a place; null values count as absent, as data frames write them."""

    data: Mapping[str, Any]
    where: str

    def bad(self, why: str) -> BadFact:
        """The error to raise: the place and the reason."""
        return BadFact(f"{self.where}: {why}")

    def junk(self, reason: str) -> Junk:
        """What to raise for a record that is left out and counted."""
        return Junk(f"{self.where}: {reason}", reason)

    def has(self, *keys: str) -> bool:
        """Whether all of the keys are there."""
        return None not in map(self.data.get, keys)  # asked a dozen times of every record, so without a generator

    def first(self, *keys: str) -> str:
        """The first of the keys that is present (for names that formats spell differently)."""
        return next((k for k in keys if self.has(k)), keys[0])

    def need(self, key: str) -> str:
        """A text that must be there."""
        text = self.text(key)
        if text is None:
            raise self.missing(key)
        return text

    def filled(self, key: str) -> str:
        """A text of a published record: without the key it is another format (refused), blank it is junk (counted)."""
        return self.filled_answers(key)[0]

    def filled_answers(self, key: str) -> tuple[str, ...]:
        """All spellings under a key that must be there; none of them with letters is junk."""
        if not self.has(key):
            raise self.missing(key)
        answers = self.answers(key)
        if not answers:
            raise self.junk(f"empty {key}")
        return answers

    def missing(self, key: str) -> BadFact:
        return self.bad(f"{key!r} is missing; the record has {names(self.data)}")

    def text(self, key: str, blank_is_none: bool = False) -> str | None:
        """A text, ends stripped; also the text in {"str": text}, as ROME has it, or the first of a list."""
        value = self.data.get(key)
        if isinstance(value, Mapping) and "str" in value:
            value = value["str"]
        while isinstance(value, list) and value:
            value = value[0]
        if value is None or (value == [] and blank_is_none):
            return None
        if not isinstance(value, str):
            raise self.bad(f"{key!r} is {kind(value)}; it must be a text")
        text = self.clean(key, value)
        if not text and not blank_is_none:
            raise self.bad(f"{key!r} is empty; write a text or leave the key out")
        return text or None

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts (or one text alone); blank ones are left out."""
        values = self.data.get(key)
        values = [] if values is None else values if isinstance(values, list) else [values]
        for value in values:
            if not isinstance(value, str):
                raise self.bad(f"{key!r} holds {kind(value)}; it must be a text or a list of texts")
        return tuple(t for t in (self.clean(key, v) for v in values) if t)

    def answers(self, key: str) -> tuple[str, ...]:
        """Every spelling that counts as right, the preferred one first, each once, blank ones left out.

        Data sets write a text, {"str": text}, {"value": text, "aliases": [...]}, a list of aliases, or a list of
        answers that are lists of aliases.
        """
        found: dict[str, None] = {}
        waiting = [self.data.get(key)]
        while waiting:
            value = waiting.pop()
            if isinstance(value, str):
                found[self.clean(key, value)] = None
            elif isinstance(value, list):
                waiting.extend(reversed(value))
            elif isinstance(value, Mapping) and ("str" in value or "value" in value):
                waiting.extend([value.get("aliases"), value.get("value"), value.get("str")])
            elif value is not None:
                raise self.bad(f"{key!r} holds {kind(value)}; it must be a text or a list of texts")
        return tuple(text for text in found if text)

    def clean(self, key: str, value: str) -> str:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            why = f"{key!r} holds half of a surrogate pair (\\ud800-\\udfff), which no tokenizer reads"
            raise self.bad(why) from None
        return value.strip()

    def id(self, *keys: str) -> str:
        """An id may be a number."""
        value = self.data.get(self.first(*keys))
        if isinstance(value, bool) or not isinstance(value, int | str | None):
            raise self.bad(f"the id is {kind(value)}; it must be a text or a whole number")
        return "" if value is None else self.clean("id", str(value))

    def template(self, prompt: str, subject: str) -> str:
        """The template of a published prompt; one that does not name its subject is junk."""
        try:
            return template_of(prompt, subject)
        except SubjectNotFound:
            raise self.junk("the subject is not in its prompt") from None

    def children(self, key: str) -> list[Record]:
        """A list of objects; a text alone stands for {"prompt": text}."""
        values = self.data.get(key)
        if values is None:
            return []
        if not isinstance(values, list):
            raise self.bad(f"{key!r} is {kind(values)}; it must be a list of objects with prompt and answer")
        return [self.child(key, {"prompt": v} if isinstance(v, str) else v) for v in values]

    def child(self, key: str, value: Any) -> Record:
        if not isinstance(value, Mapping):
            raise self.bad(f"{key!r} holds {kind(value)}; it must be an object")
        return Record(value, f"{self.where}, {key}")


def templates(texts: tuple[str, ...], subject: str) -> tuple[str, ...]:
    """Full prompts as templates where they name the subject; others stay as they are."""
    return tuple(template_of(t, subject) if subject in t else t for t in texts)


def names(data: Mapping[str, Any]) -> str:
    """The keys for a message: quoted, at most ten of them, each at most 40 characters."""
    keys = [repr(str(k)[:40]) for k in list(data)[:10]]
    return ", ".join(keys) + (f" and {len(data) - 10} more" if len(data) > 10 else "") if keys else "(none)"


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
