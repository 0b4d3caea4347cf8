"""A record on its way to becoming a fact: typed reading of its keys, with its place in every error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import BadFact


@dataclass(frozen=True)
class Record:
    """A JSON object with a place; null values count as absent, as data frames write them."""

    data: Mapping[str, Any]
    where: str

    def bad(self, why: str) -> BadFact:
        """The error to raise: the place and the reason."""
        return BadFact(f"{self.where}: {why}")

    def has(self, key: str) -> bool:
        return self.data.get(key) is not None

    def first(self, *keys: str) -> str:
        """The first of the keys that is present (for names that formats spell differently)."""
        return next((k for k in keys if self.has(k)), keys[0])

    def need(self, key: str) -> str:
        """A text that must be there."""
        text = self.text(key)
        if text is None:
            raise self.bad(f"{key!r} is missing; the record has {names(self.data)}")
        return text

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

    def clean(self, key: str, value: str) -> str:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            why = f"{key!r} holds half of a surrogate pair (\\ud800-\\udfff), which no tokenizer reads"
            raise self.bad(why) from None
        return value.strip()

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


def names(data: Mapping[str, Any]) -> str:
    """The keys for a message: quoted, at most ten of them, each at most 40 characters."""
    keys = [repr(str(k)[:40]) for k in list(data)[:10]]
    return ", ".join(keys) + (f" and {len(data) - 10} more" if len(data) > 10 else "") if keys else "(none)"


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
