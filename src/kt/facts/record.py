"""A JSON record: typed reading of its keys, with the record's location in every error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from ..errors import BadFact, SubjectNotFound
from .fact import Prompt, prompt_text, stripped, template_of

NO_ANSWER = frozenset(
    {"<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "</s>", "<s>", "<eos>"}
    | {"<bos>", "<pad>", "[PAD]", "[SEP]"}
)
"""Special tokens that published files have where there is no answer."""

ZsreTarget = Literal["answer", "alt"]


class Choices(NamedTuple):
    """A user's choices.

    Args:
        zsre_target: the zsRE answer that is edited in.
        known_to: the model whose known facts are read; None for all.
        join: the text between every prompt and its answer; None for what `prompt_gap` finds.
    """

    zsre_target: str = "answer"
    known_to: str | None = None
    join: str | None = None

    def checked(self) -> Choices:
        """Raise BadFact for an unknown zsRE target."""
        if self.zsre_target not in get_args(ZsreTarget):
            known = " or ".join(get_args(ZsreTarget))
            raise BadFact(f"zsRE target {self.zsre_target!r} is not understood; choose {known}")
        return self


class Junk(BadFact):
    """A record of a published data set that cannot be edited: it is counted and left out.

    `reason` names no location, so that records left out for the same reason are counted together.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Record:
    """A JSON object and its location.

    Null and NaN count as absent, since data frames write absent values so. `notes` collects what is left out of the
    record or taken another way than it says; nested records share it. Of a `lenient` record (of a published data set)
    a part of the wrong type is left out and noted; in any other it is an error.
    """

    data: Mapping[str, Any]
    where: str
    notes: list[str] = field(default_factory=list, compare=False)
    lenient: bool = False

    def __post_init__(self) -> None:
        if any(isinstance(value, float) and math.isnan(value) for value in self.data.values()):
            object.__setattr__(self, "data", {k: None if v != v else v for k, v in self.data.items()})

    def bad(self, why: str) -> BadFact:
        """The error to raise: location and reason."""
        return BadFact(f"{self.where}: {why}")

    def junk(self, reason: str) -> Junk:
        """The error to raise for a record that is left out and counted."""
        return Junk(f"{self.where}: {reason}", reason)

    def has(self, *keys: str) -> bool:
        """Whether all keys are present."""
        return None not in map(self.data.get, keys)  # runs a dozen times per record; a generator would be slower

    def first(self, *keys: str) -> str:
        """The first key that is present, or `keys[0]` (for names that formats spell differently)."""
        return next((k for k in keys if self.has(k)), keys[0])

    def need(self, key: str) -> str:
        """The text of a required key."""
        text = self.text(key)
        if text is None:
            raise self.missing(key)
        return text

    def prompt(self, key: str) -> str:
        """The required text of a prompt; a line end at its end stays. A blank one is junk in a published record."""
        return self.as_prompt(key, self.filled(key))

    def as_prompt(self, key: str, text: str) -> str:
        """The prompt under a key whose stripped text is known."""
        value = self.data.get(key)
        return prompt_text(value) if isinstance(value, str) else text

    def filled(self, key: str) -> str:
        """The required text of a published record; a missing key is an error, a blank text is junk."""
        return self.filled_answers(key)[0]

    def filled_answers(self, key: str) -> tuple[str, ...]:
        """All spellings under a required key; a missing key is an error, only blank texts are junk."""
        if key not in self.data:
            raise self.missing(key)
        answers = self.answers(key)
        if not answers:
            raise self.junk(f"empty {key}")
        return answers

    def missing(self, key: str) -> BadFact:
        """The error to raise for a missing key."""
        return self.bad(f"{key!r} is missing; the record has {names(self.data)}")

    def text(self, key: str, blank_is_none: bool = False) -> str | None:
        """The stripped text under a key; {"str": text} (ROME's form) and lists give their text, their first text."""
        value = self.data.get(key)
        if isinstance(value, Mapping) and "str" in value:
            value = value["str"]
        while isinstance(value, list) and value:
            if len(value) > 1 and not self.lenient:
                raise self.bad(f"{key!r} holds {len(value)} texts; give one, and a record for each of the others")
            if len(value) > 1:
                self.notes.append(f"several texts in {key!r}, of which the first is read")
            value = value[0]
        if value is None or (value == [] and blank_is_none):
            return None
        text = self.clean(key, self._as_text(key, value, "is", "it must be a text"))
        if not text and not blank_is_none:
            raise self.bad(f"{key!r} is empty; write a text or leave the key out")
        return text or None

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts (or a single text) without blank and null ones, which are noted.

        A line end at a text's end stays, since prompts may have it.
        """
        values = self.data.get(key)
        values = [] if values is None else values if isinstance(values, list) else [values]
        wrong = [value for value in values if not isinstance(value, str | None)]
        for value in wrong:
            self.wrong(key, value, "it must be a text or a list of texts")
        values = [value for value in values if isinstance(value, str | None)]
        kept = tuple(v.lstrip() for v in values if v is not None and self.clean(key, v))
        if isinstance(self.data.get(key), list):
            self.left_out(key, len(values) - len(kept))
        return kept

    def wrong(self, key: str, value: Any, remedy: str) -> None:
        """Note a part of the wrong type, which is left out, of a lenient record; else refuse it."""
        if not self.lenient:
            raise self.bad(f"{key!r} holds {kind(value)}; {remedy}")
        self.notes.append(f"{kind(value)} in {key!r}, left out")

    def left_out(self, key: str, n: int = 1) -> None:
        """Note that `n` blank entries of a list are left out."""
        self.notes.extend([f"blank or null in {key!r}, left out"] * n)

    def _as_text(self, key: str, value: Any, verb: str, remedy: str) -> str:
        """A text, or a number as it is written (5.0, which data frames make of 5, as "5")."""
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self.bad(f"{key!r} {verb} {kind(value)}; {remedy}")
        if isinstance(value, str):
            return value
        self.notes.append(f"a number in {key!r}, read as text")
        return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)

    def answers(self, key: str) -> tuple[str, ...]:
        """Every accepted spelling once, the preferred one first, without blank ones.

        Data sets write a text, {"str": text}, {"value": text, "aliases": [...]}, a list of aliases, or a list of
        answers that are lists of aliases.
        """
        spellings: dict[str, None] = {}
        stack = [self.data.get(key)]
        while stack:
            value = stack.pop()
            if isinstance(value, list):
                stack.extend(reversed(value))
            elif isinstance(value, Mapping) and ("str" in value or "value" in value):
                stack.extend([value.get("aliases"), value.get("value"), value.get("str")])
            elif value is not None and value == value:
                text = self._as_text(key, value, "holds", "it must be a text or a list of texts")
                spellings[self.clean(key, text)] = None
        return tuple(text for text in spellings if text and text not in NO_ANSWER)

    def answer_and_aliases(self, key: str) -> tuple[str | None, tuple[str, ...]]:
        """The preferred spelling (None without any) and the others."""
        answer, *aliases = self.answers(key) or (None,)
        return answer, tuple(alias for alias in aliases if alias)

    def prompts(self, key: str, answer_key: str, kind: str) -> tuple[Prompt, ...]:
        """The prompts under `key` with the answers under `answer_key`; blank prompts are left out and noted.

        The answers of several prompts are a list as long, or one text for all. All answers belong to a single prompt.
        Of lists of unequal lengths nobody knows which answer is whose: all are left out and noted.
        """
        texts, truths = self.data.get(key), self.data.get(answer_key)
        if texts is None:
            return ()
        texts = texts if isinstance(texts, list) else [texts]
        if len(texts) == 1 or not isinstance(truths, list):
            truths = [truths] * len(texts)
        if len(truths) != len(texts):
            if not self.lenient:
                raise self.bad(f"{len(texts)} prompts but {len(truths)} ground truths; give one for each")
            self.notes.extend([f"a prompt in {key!r} beside another number of answers, left out"] * len(texts))
            return ()
        prompts = []
        for text, truth in zip(texts, truths, strict=True):
            pair = Record({key: text, answer_key: truth}, self.where, self.notes, self.lenient)
            try:
                answer, aliases = pair.answer_and_aliases(answer_key)
            except BadFact:
                pair.wrong(answer_key, truth, "it must be a text or a list of texts")
                continue
            kept = pair.texts(key)
            if not kept and isinstance(text, str | None):
                self.left_out(key)
            prompts += [Prompt(prompt, answer, None, kind, aliases) for prompt in kept]
        return tuple(prompts)

    def answered(self, prompts: Iterable[Prompt]) -> tuple[Prompt, ...]:
        """The prompts that have an answer; the others cannot be scored, and are noted."""
        every = tuple(prompts)
        kept = tuple(prompt for prompt in every if prompt.answer)
        self.notes.extend(["a portability prompt without an answer, left out"] * (len(every) - len(kept)))
        return kept

    def clean(self, key: str, value: str) -> str:
        """The stripped text; BadFact for half of a surrogate pair."""
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            why = f"{key!r} holds half of a surrogate pair (\\ud800-\\udfff), which no tokenizer reads"
            raise self.bad(why) from None
        return stripped(value)

    def prefix(self) -> str | None:
        """The record's `target_prefix`, as written (it may be blank or empty); None without one."""
        value = self.data.get("target_prefix")
        if value is not None and not isinstance(value, str):
            raise self.bad(f"'target_prefix' is {kind(value)}; it must be the text between prompt and answer")
        return value

    def id(self, *keys: str) -> str:
        """The id under the first key that is present; it may be a whole number. "" without one."""
        value = self.data.get(self.first(*keys))
        if isinstance(value, bool) or not isinstance(value, int | float | str | None):
            raise self.bad(f"the id is {kind(value)}; it must be a text or a number")
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return "" if value is None else self.clean("id", str(value))

    def template(self, prompt: str, subject: str, filled: bool = True) -> str:
        """The template of a published prompt; a prompt without its subject is junk.

        Braces in a prompt that is `filled` with its subject are text.
        """
        try:
            return template_of(prompt, subject, filled)
        except SubjectNotFound as error:
            other_form = "Unicode form" in str(error)
            raise self.junk(
                "the subject is in its prompt in another Unicode form (NFC, NFD)"
                if other_form
                else "the subject is not in its prompt"
            ) from None

    def children(self, key: str) -> list[Record]:
        """A list of objects; a text alone stands for {"prompt": text}. Null and blank ones are left out and noted. In a
        lenient record a single one is a list of one."""
        values = self.data.get(key)
        if values is None:
            return []
        if self.lenient and not isinstance(values, list):
            values = [values]
        if not isinstance(values, list):
            raise self.bad(f"{key!r} is {kind(values)}; it must be a list of objects with prompt and answer")
        return self.entries(key, values)

    def entries(self, key: str, values: list[Any]) -> list[Record]:
        """The objects of a list as records, as `children` reads them."""
        right = [value for value in values if isinstance(value, Mapping | str | None)]
        for value in values:
            if not isinstance(value, Mapping | str | None):
                self.wrong(key, value, "it must be an object")
        objects = [self.child(key, {"prompt": v} if isinstance(v, str) else v) for v in right if v is not None]
        kept = [entry for entry in objects if not _is_blank(entry.data)]
        self.left_out(key, len(right) - len(kept))
        return kept

    def child(self, key: str, value: Any) -> Record:
        """A nested object as a record."""
        if not isinstance(value, Mapping):
            raise self.bad(f"{key!r} holds {kind(value)}; it must be an object")
        return Record(value, f"{self.where}, {key}", self.notes, self.lenient)


def _is_blank(entry: Mapping[str, Any]) -> bool:
    """Whether the entry has a prompt and it is blank or null."""
    prompt = entry.get("prompt", ...)
    return prompt is None or (isinstance(prompt, str) and not prompt.strip())


def templates(texts: tuple[str, ...], subject: str, filled: bool = True) -> tuple[str, ...]:
    """Turn full prompts that contain the subject into templates; other texts stay unchanged."""
    return tuple(template_of(t, subject, filled) if subject in t else t for t in texts)


def names(data: Mapping[str, Any]) -> str:
    """The keys for a message: quoted, at most ten keys of at most 40 characters."""
    keys = [repr(str(k)[:40]) for k in list(data)[:10]]
    return ", ".join(keys) + (f" and {len(data) - 10} more" if len(data) > 10 else "") if keys else "(none)"


def kind(value: Any) -> str:
    """The type of a JSON value in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
