"""A fact: the one record that serves tracing (answer, foil) and editing (target)."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from .._util.data import plain, to_json
from .._util.kinds import TEXT, TEXT_OR_NONE, require_kinds, shown
from .._util.text import count
from ..errors import BadFact, SubjectNotFound

_PLACE = re.compile(r"(?<!\{)\{\}(?!\})")
_KEPT_ENDS = "\n\r\t\u3000"
_INVISIBLE = "\u200b\u2060\ufeff"
"""Characters without width that are taken off where white space is."""


class BadPrompt(BadFact):
    """A prompt that cannot be asked. `reason` names no text, so that records left out for it are counted together."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Prompt:
    """A prompt that belongs to a fact: a neighbour, or a consequence of the edit.

    `answer` is the right continuation (after the edit, for a consequence), `aliases` are other right spellings and
    answers, `original` is the answer before the edit. `kind` is the data set's name for such prompts ("Reasoning").
    `target_prefix` is the text between prompt and answers, as in `Fact`. Of prompts of a fact with the same `any_of`,
    the best answer counts, once.
    """

    prompt: str
    answer: str | None = None
    original: str | None = None
    kind: str = ""
    aliases: tuple[str, ...] = ()
    target_prefix: str | None = None
    any_of: str = ""

    def __repr__(self) -> str:
        given = [f"{spec.name}={getattr(self, spec.name)!r}" for spec in fields(self)[1:]
                 if getattr(self, spec.name) != spec.default]  # fmt: skip
        return f"Prompt({', '.join([repr(self.prompt), *given])})"

    def __post_init__(self) -> None:
        _require_texts(self, ("prompt", "kind", "any_of"), ("answer", "original", "target_prefix"))
        _refuse_text(self, "aliases")
        _settle(self, {"prompt": prompt_text(self.prompt), **_stripped(self, ("answer", "original"), ("aliases",))})


@dataclass(frozen=True, init=False)
class Fact:
    """(subject, relation, object) as a prompt template, with an old answer and a new one.

    `template` holds one `{}` for the subject (`{{}}` stands for braces of the text). `foil` is a wrong answer of the
    same relation, r' of eq. 8, which tracing contrasts with the answer; `target` is what an edit should give.
    `rephrasings` ask the same in other words. `answer_aliases` and `target_aliases` are other spellings that count as
    right in comparisons of text; tracing and editing use the first spelling.
    `target_prefix` is the text between the prompt (or a paraphrase) and any answer; None lets
    `kt.model.joining.prompt_gap` decide between a space and nothing.

    White space is treated here, for facts from files and from Python: subject and answers lose it at both ends, prompts
    lose it at their start, and spaces at their end. A line end or a tab at a prompt's end stays, no space follows it.
    `{}` in a prompt of `neighbours`, `hops` or `generation` also stands for the subject.

    The keys of our own records are taken as well, with values as in a file: `prompt` (a template, or a text that
    contains the subject) for `template`, `target_new`, `target_true`, `paraphrases`, `neighbourhood`, `portability`.

    Raises:
        BadFact: the subject is empty, a prompt is empty or ends in a character that no answer can follow, or a text
            stands where several belong.
        SubjectNotFound: the template has no place for the subject, or a prompt has two.

    Examples:
        >>> fact = kt.Fact("The capital of {} is", "France", answer="Paris", target="Rome")
        >>> fact.prompt
        'The capital of France is'
    """

    template: str
    subject: str
    answer: str | None
    foil: str | None
    target: str | None
    id: str
    relation: str
    rephrasings: tuple[str, ...]
    neighbours: tuple[Prompt, ...]
    hops: tuple[Prompt, ...]
    generation: tuple[str, ...]
    answer_aliases: tuple[str, ...]
    target_aliases: tuple[str, ...]
    target_prefix: str | None

    def __init__(
        self,
        template: str | None = None,
        subject: str | None = None,
        answer: str | None = None,
        foil: str | None = None,
        target: str | None = None,
        id: str = "",
        relation: str = "",
        rephrasings: Sequence[str] = (),
        neighbours: Sequence[Prompt] = (),
        hops: Sequence[Prompt] = (),
        generation: Sequence[str] = (),
        answer_aliases: Sequence[str] = (),
        target_aliases: Sequence[str] = (),
        target_prefix: str | None = None,
        **record: Any,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "record")}
        if record or template is None or subject is None:
            given = _from_record(given, record)
        for name, value in given.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        """Refuse what cannot be asked, and treat white space."""
        _require_texts(self, ("template", "subject", "id", "relation"), ("answer", "foil", "target", "target_prefix"))
        _refuse_text(self, *_LISTS)
        _settle(self, {"subject": stripped(self.subject)})
        if not self.subject:
            raise BadFact(f"fact {self.id or self.template!r}: the subject is empty; give the entity's name")
        if n_places(self.template) != 1:
            raise SubjectNotFound(
                f"{self.template!r} must mark the place of the subject {self.subject!r} with one {{}} "
                "({{}} stands for braces of the text)"
            )
        treated = {
            "template": prompt_text(self.template),
            "rephrasings": tuple(_one_place(prompt_text(text)) for text in self.rephrasings),
            "generation": tuple(fill(_one_place(prompt_text(text)), self.subject) for text in self.generation),
            "neighbours": tuple(self._about(near) for near in self.neighbours),
            "hops": tuple(self._about(hop) for hop in self.hops),
        }
        aliases = ("answer_aliases", "target_aliases")
        _settle(self, treated | _stripped(self, ("answer", "foil", "target"), aliases))

    def _about(self, prompt: Prompt) -> Prompt:
        """A neighbour or consequence with the subject in place of its `{}`."""
        text = fill(_one_place(prompt.prompt), self.subject)
        if text == prompt.prompt:
            return prompt
        if text == self.prompt:
            message = f"{prompt.prompt!r} is the fact's own prompt; write another subject in place of its {{}}"
            raise BadPrompt(message, "a neighbour is the fact's own prompt")
        return replace(prompt, prompt=text)

    def __repr__(self) -> str:
        parts = [f"{self.prompt!r}, subject {self.subject!r}"]
        parts += [f"{name} {text!r}" for name in ("answer", "foil", "target") if (text := getattr(self, name))]
        kinds = {"rephrasings": "paraphrase", "neighbours": "neighbour", "hops": "hop"}
        parts += [count(len(getattr(self, name)), kind) for name, kind in kinds.items() if getattr(self, name)]
        return f"Fact({', '.join(parts)})"

    def _repr_html_(self) -> str:
        from .shown import facts_table

        return facts_table([self])._repr_html_()

    @property
    def prompt(self) -> str:
        """The template with the subject filled in."""
        return fill(self.template, self.subject)

    @property
    def paraphrases(self) -> tuple[str, ...]:
        """The rephrasings as full prompts."""
        return tuple(fill(r, self.subject) for r in self.rephrasings)

    # The names of records -------------------------------------------------------------------------------------------
    @property
    def target_new(self) -> str | None:
        """The target, by its name in records."""
        return self.target

    @property
    def target_true(self) -> str | None:
        """The old answer, by its name in records."""
        return self.answer

    @property
    def neighbourhood(self) -> tuple[Prompt, ...]:
        """The neighbours, by their name in records."""
        return self.neighbours

    @property
    def portability(self) -> tuple[Prompt, ...]:
        """The consequences of the new fact (`hops`), by their name in records."""
        return self.hops

    def as_request(self) -> Fact:
        """The fact as an edit request; if it has no target, the foil becomes the target.

        Raises:
            BadFact: there is no target, or the target is the old answer.
        """
        target = self.target if self.target is not None else self.foil
        name = self.id or self.prompt
        if target is None or not target.strip():
            raise BadFact(f"edit request {name!r}: the target is empty; give target_new (or --target)")
        if self.answer is not None and target.strip() == self.answer.strip():
            raise BadFact(f"edit request {name!r}: the target {target!r} is the old answer; nothing to edit")
        return replace(self, target=target.strip())


_LISTS = ("rephrasings", "neighbours", "hops", "generation", "answer_aliases", "target_aliases")
_IN_RECORDS = {"template": "prompt", "rephrasings": "paraphrases", "neighbours": "neighbourhood", "hops": "portability"}
"""Fields of a fact that records call by another name."""


def _from_record(given: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """The fields of a fact that is given by the keys of a record."""
    from .formats import read_record
    from .readers.own import unknown_key

    values = {_IN_RECORDS.get(name, name): value for name, value in given.items() if value not in (None, "", ())}
    for name in record:
        if name in values:
            raise BadFact(f"kt.Fact: {name!r} is given twice, also by the name of its field; leave one out")
        if hint := unknown_key(name):
            raise BadFact(f"kt.Fact: {hint}")
    values |= record
    prompts = {}  # those that are made already know more than a record does
    for name in ("neighbours", "hops"):
        listed = values.get(_IN_RECORDS[name]) or ()
        if not isinstance(listed, str) and all(isinstance(prompt, Prompt) for prompt in listed):
            prompts[name] = values.pop(_IN_RECORDS[name], ())
    fact = read_record(plain(values), "kt.Fact", "kt")
    return {name: getattr(fact, name) for name in given} | prompts


def _require_texts(record: object, needed: Sequence[str], others: Sequence[str]) -> None:
    """Refuse what is no text where one belongs; `others` may be None."""
    kinds = dict.fromkeys(needed, TEXT) | dict.fromkeys(others, TEXT_OR_NONE)
    require_kinds({name: getattr(record, name) for name in kinds}, kinds, BadFact)


def _refuse_text(record: object, *names: str) -> None:
    """A text where several belong would be taken apart into its characters."""
    kind = type(record).__name__
    for name in names:
        if isinstance(value := getattr(record, name), str):
            raise BadFact(f"{name} of a {kind} is the text {value[:60]!r}; give a list of them, as [{value[:60]!r}]")
        part, what = (Prompt, "prompts, each a kt.Prompt") if name in ("neighbours", "hops") else (str, "texts")
        listed = tuple(value) if isinstance(value, Iterable) else (None,)
        if not all(isinstance(each, part) for each in listed):
            raise BadFact(f"{name} of a {kind} is {shown(value)}; give a list of {what}")
        object.__setattr__(record, name, listed)


def facts_digest(facts: Sequence[Fact]) -> str:
    """SHA-256 of the facts as JSON; younger fields count only where they are set, since older runs have none."""
    return hashlib.sha256(to_json([_as_older(plain(fact)) for fact in facts]).encode()).hexdigest()


def _as_older(value: dict[str, object]) -> dict[str, object]:
    for key in ("neighbours", "hops"):
        prompts = value.get(key)
        if isinstance(prompts, list):
            value[key] = [_as_older(prompt) for prompt in prompts]
    return {k: v for k, v in value.items() if (k, v) not in (("target_prefix", None), ("any_of", ""))}


def joined_by(fact: Fact, text: str | None) -> Fact:
    """The fact with `text` between every prompt and its answers, where it names no `target_prefix` of its own."""
    if text is None:
        return fact

    def joined(prompts: tuple[Prompt, ...]) -> tuple[Prompt, ...]:
        return tuple(p if p.target_prefix is not None else replace(p, target_prefix=text) for p in prompts)

    prefix = text if fact.target_prefix is None else fact.target_prefix
    return replace(fact, target_prefix=prefix, neighbours=joined(fact.neighbours), hops=joined(fact.hops))


def prompt_text(text: str) -> str:
    """A prompt as the model reads it: no white space before it and no spaces behind it.

    The text between prompt and answer supplies the space. Line ends, tabs and an ideographic space at the end stay.

    Raises:
        BadPrompt: the prompt is empty, or ends in another white space or an invisible character (U+00A0, U+200B, ...).
    """
    kept = text[len(text) - len(stripped(text, left=True)) :].rstrip(" ")
    if not kept:
        raise BadPrompt("a prompt is empty; write a text or leave the prompt out", "an empty prompt")
    end = kept[-1]
    unseen = end.isspace() or (unicodedata.category(end) in ("Cc", "Cf") and end < "\U000e0000")  # flags end above
    if unseen and end not in _KEPT_ENDS:
        name = f"U+{ord(end):04X} ({unicodedata.name(end, 'a control character')})"
        message = f"the prompt {text!r} ends in {name}, behind which no answer can be meant; take it out"
        raise BadPrompt(message, f"a prompt ends in {name}")
    return kept


def stripped(text: str, left: bool = False) -> str:
    """The text without white space and invisible characters at both ends (or at its start)."""
    start, stop = 0, len(text)
    while start < stop and _blank(text[start]):
        start += 1
    while start < stop and not left and _blank(text[stop - 1]):
        stop -= 1
    return text[start:stop]


def _blank(character: str) -> bool:
    return character.isspace() or character in _INVISIBLE


def n_places(template: str) -> int:
    """How many `{}` the template has; `{{}}` is none."""
    return len(_PLACE.findall(template))


def split_template(template: str) -> tuple[str, str] | None:
    """The texts before and after the first `{}`, each `{{}}` in them as `{}`; None without a place."""
    if (place := _PLACE.search(template)) is None:
        return None
    return template[: place.start()].replace("{{}}", "{}"), template[place.end() :].replace("{{}}", "{}")


def fill(template: str, subject: str) -> str:
    """Put the subject in the place of the first `{}`. `str.format` would fail on other braces in prompts."""
    parts = split_template(template)
    return template.replace("{{}}", "{}") if parts is None else parts[0] + subject + parts[1]


def template_of(prompt: str, subject: str, filled: bool = False) -> str:
    """The template behind a prompt: `{}` in place of the subject (see `subject_start`).

    A prompt that has a `{}` is a template already, unless it is `filled`: then braces beside its subject are text.

    Raises:
        SubjectNotFound: the prompt has neither a `{}` nor the subject.
    """
    start = subject_start(prompt, subject)
    if n_places(prompt) and not (filled and start >= 0):
        return prompt
    if start < 0:
        other = unicodedata.normalize("NFC", subject) in unicodedata.normalize("NFC", prompt)
        if subject and other:
            raise SubjectNotFound(
                f"{subject!r} is in {prompt!r} in another Unicode form (one is NFC, one NFD); save both in one form"
            )
        raise SubjectNotFound(f"{subject!r} does not occur in {prompt!r}; mark its place in the prompt with {{}}")
    before, after = prompt[:start], prompt[start + len(subject) :]
    if filled:
        before, after = (_PLACE.sub("{{}}", text) for text in (before, after))
    return before + "{}" + after


def subject_start(text: str, subject: str) -> int:
    """Where the subject begins: its last occurrence as whole words, else its last inside one; -1 if it is absent.

    >>> subject_start("i see how wide it is", "i"), subject_start("Paris Hilton likes Paris", "Paris")
    (0, 19)
    """
    whole = words_at(text, subject)
    return whole[-1] if whole else text.rfind(subject) if subject else -1


_OTHER_MARK = re.compile(r"\{(?:subject|entity|s|0)\}|\[(?:X|SUBJ|SUBJECT)\]|<subject>", re.I)


def doubts(fact: Fact) -> list[str]:
    """What the author of a fact may have meant otherwise: which of several occurrences the subject's place is, and
    other tools' marks of it."""
    n_whole, n_inside = len(words_at(fact.prompt, fact.subject)), fact.prompt.count(fact.subject)
    found = []
    if n_whole > 1 or (not n_whole and n_inside > 1):
        found.append(
            "the subject stands more than once in its prompt (the place marked by {} counts, else the last one)"
        )
    elif not n_whole and n_inside:
        found.append("the subject stands in its prompt only inside another word")
    texts = (*fact.rephrasings, *(near.prompt for near in (*fact.neighbours, *fact.hops)), *fact.generation)
    if mark := _OTHER_MARK.search("\n".join((fact.template, *texts))):
        found.append(f"a prompt holds {mark.group()}, which is asked as it stands ({{}} marks the subject)")
    return found


def words_at(text: str, subject: str) -> list[int]:
    """Where the subject occurs as whole words; in scripts without spaces and Korean (particles), wherever it occurs."""
    if not subject:
        return []
    starts = [match.start() for match in re.finditer(f"(?={re.escape(subject)})", text)]

    def parts(at: int) -> bool:
        """Whether a word begins at this character."""
        if not 0 < at < len(text):
            return True
        return unicodedata.category(text[at])[0] != "M" and not (
            in_a_word(text[at - 1]) and in_a_word(text[at]) and not (unspaced(text[at - 1]) or unspaced(text[at]))
        )

    whole = [at for at in starts if parts(at) and parts(at + len(subject))]
    return [at for n, at in enumerate(whole) if n == 0 or at >= whole[n - 1] + len(subject)]


def in_a_word(character: str) -> bool:
    """Whether it is of a word: a letter, a digit, an underscore or a mark on one."""
    return character.isalnum() or character == "_" or unicodedata.category(character)[0] == "M"


def unspaced(c: str) -> bool:
    """Whether words of the character's script stand together, or have particles behind them."""
    return any(low <= c < high for low, high in _UNSPACED)


_UNSPACED = (
    ("\u0e00", "\u10a0"), ("\u1100", "\u1200"), ("\u1780", "\u1800"), ("\u2e80", "\ua4d0"), ("\uac00", "\ufb00"),
    ("\U00020000", "\U00040000"),
)  # fmt: skip
"""Thai, Lao, Tibetan, Burmese, Hangul, Khmer and CJK: where words stand together, or particles behind them."""


def _stripped(record: object, texts: tuple[str, ...], lists: tuple[str, ...]) -> dict[str, object]:
    """The answers without white space at their ends."""
    single = {name: stripped(text) for name in texts if (text := getattr(record, name)) is not None}
    return single | {name: tuple(map(stripped, getattr(record, name))) for name in lists}


def _settle(record: object, values: dict[str, object]) -> None:
    """Set fields of a frozen record that differ from these values."""
    for name, value in values.items():
        if value != getattr(record, name):
            object.__setattr__(record, name, value)


def _one_place(prompt: str) -> str:
    if n_places(prompt) > 1:
        message = f"{prompt!r} has more than one {{}}; mark the subject once, and write braces of the text as {{{{}}}}"
        raise BadPrompt(message, "a prompt with more than one {}")
    return prompt
