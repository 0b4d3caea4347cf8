"""A fact: the one record that serves tracing (answer, foil) and editing (target)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .._util.data import to_json
from ..errors import BadFact, SubjectNotFound


@dataclass(frozen=True)
class Prompt:
    """A prompt that belongs to a fact: a neighbour, or a consequence of the edit.

    `answer` is the right continuation (after the edit, for a consequence), `aliases` are other right spellings and
    answers, `original` is the answer before the edit. `kind` is the data set's name for such prompts ("Reasoning").
    """

    prompt: str
    answer: str | None = None
    original: str | None = None
    kind: str = ""
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fact:
    """(subject, relation, object) as a prompt template, with an old answer and a new one.

    `template` holds one `{}` for the subject; answers have no leading space. `foil` is a wrong answer of the same
    relation, r' of eq. 8, which tracing contrasts with the answer; `target` is the answer that an edit should give.
    Aliases are other spellings that count as right in comparisons of text; tracing and editing use the first spelling.
    """

    template: str
    subject: str
    answer: str | None = None
    foil: str | None = None
    target: str | None = None
    id: str = ""
    relation: str = ""
    rephrasings: tuple[str, ...] = ()
    neighbours: tuple[Prompt, ...] = ()
    hops: tuple[Prompt, ...] = ()
    generation: tuple[str, ...] = ()
    answer_aliases: tuple[str, ...] = ()
    target_aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.subject.strip():
            raise BadFact(f"fact {self.id or self.template!r}: the subject is empty; give the entity's name")
        if self.template.count("{}") != 1:
            raise SubjectNotFound(
                f"{self.template!r} must mark the place of the subject {self.subject!r} with one {{}}"
            )

    @property
    def prompt(self) -> str:
        """The template with the subject filled in."""
        return fill(self.template, self.subject)

    @property
    def paraphrases(self) -> tuple[str, ...]:
        """The rephrasings as full prompts."""
        return tuple(fill(r, self.subject) for r in self.rephrasings)

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


def facts_digest(facts: Sequence[Fact]) -> str:
    """SHA-256 of the facts as JSON."""
    return hashlib.sha256(to_json(list(facts)).encode()).hexdigest()


def fill(template: str, subject: str) -> str:
    """Put the subject into the template. `str.format` would fail on other braces in prompts."""
    return template.replace("{}", subject, 1) if "{}" in template else template


def template_of(prompt: str, subject: str) -> str:
    """The template behind a full prompt: `{}` in place of the subject's last occurrence."""
    if "{}" in prompt:
        return prompt
    start = prompt.rfind(subject)
    if not subject or start < 0:
        raise SubjectNotFound(f"{subject!r} does not occur in {prompt!r}; mark its place in the prompt with {{}}")
    return prompt[:start] + "{}" + prompt[start + len(subject) :]
