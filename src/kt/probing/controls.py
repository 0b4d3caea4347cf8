"""The controls of the old answer: other answers of its relation, and other subjects in its prompt.

Both are drawn by a hash of the seed and the texts, so the order of the facts and the numbers of a random generator
decide nothing. Answers that no measured fact has as its old or new one come first: what the edit raises or lowers on
purpose is a poor yardstick for what it left.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..facts.fact import Fact, fill
from ..model.chat import in_turn
from ..model.tokens import target_ids

MOST = 8
"""Controls of one fact."""
SUBJECTS = 3
"""Other subjects that one fact's prompt is filled with."""


class Control(NamedTuple):
    """Another answer of the relation, and its first token after the fact's prompt."""

    text: str
    token: int


class ControlPrompt(NamedTuple):
    """The fact's prompt about another subject, whose answer is not the old one; `token` begins its true answer."""

    prompt: str
    subject: str
    token: int


@dataclass(frozen=True)
class Relations:
    """Subjects and answers by relation.

    A fact that names no relation has that of the facts with its template; where none of them names one, or they name
    several, the template itself stands for the relation.
    """

    known: dict[str, tuple[tuple[str, str], ...]]
    """Relation -> (subject, answer), each once, sorted."""
    touched: dict[str, frozenset[str]]
    """Relation -> the old and new answers of the measured facts."""
    by_template: dict[str, str]
    """Template -> the one relation that facts with it name."""

    @staticmethod
    def of(facts: Sequence[Fact], pool: Iterable[Fact] | None = None) -> Relations:
        """From the measured facts and a larger list of known ones (by default the measured facts themselves)."""
        known: dict[str, set[tuple[str, str]]] = defaultdict(set)
        touched: dict[str, set[str]] = defaultdict(set)
        named: dict[str, set[str]] = defaultdict(set)
        everything = [*facts, *(pool or ())]
        for fact in everything:
            if fact.relation:
                named[_template(fact)].add(fact.relation)
        by_template = {template: names.pop() for template, names in named.items() if len(names) == 1}
        for fact in everything:
            if fact.answer and fact.answer.strip():
                known[_relation(fact, by_template)].add((fact.subject, fact.answer.strip()))
        for fact in facts:
            texts = (fact.answer, fact.target or fact.foil)
            touched[_relation(fact, by_template)] |= {text.strip() for text in texts if text}
        return Relations(
            {name: tuple(sorted(pairs)) for name, pairs in known.items()},
            {name: frozenset(texts) for name, texts in touched.items()},
            by_template,
        )

    def controls(
        self, tokenizer: Any, fact: Fact, old: int, new: int, seed: int, most: int = MOST
    ) -> tuple[Control, ...]:
        """Up to `most` answers of other subjects; no two begin alike, and none begins as the old or the new one."""
        name = _relation(fact, self.by_template)
        touched, known = self.touched.get(name, frozenset()), self.known.get(name, ())
        own_answers = {answer for subject, answer in known if subject == fact.subject}
        texts = sorted({answer for _, answer in known} - own_answers)
        texts.sort(key=lambda text: (text in touched, draw_key(seed, fact.prompt, text)))
        chosen: dict[int, Control] = {}
        for text in texts:
            token = target_ids(tokenizer, fact.prompt, text, fact.target_prefix)[0]
            if token not in (old, new):
                chosen.setdefault(token, Control(text, token))
            if len(chosen) == most:
                break
        return tuple(chosen.values())

    def elsewhere(
        self, tokenizer: Any, fact: Fact, old: int, new: int, seed: int, most: int = SUBJECTS
    ) -> tuple[ControlPrompt, ...]:
        """The prompt about up to `most` other subjects of the relation whose answer is neither the old nor the new."""
        others = [pair for pair in self.known.get(_relation(fact, self.by_template), ()) if pair[0] != fact.subject]
        others.sort(key=lambda pair: draw_key(seed, fact.prompt, *pair))
        prompts: dict[str, ControlPrompt] = {}
        for subject, answer in others:
            prompt = fill(fact.template, subject)
            token = target_ids(tokenizer, in_turn(tokenizer, prompt, fact.prompt), answer, fact.target_prefix)[0]
            if token not in (old, new):
                prompts.setdefault(subject, ControlPrompt(prompt, subject, token))
            if len(prompts) == most:
                break
        return tuple(prompts.values())


def _relation(fact: Fact, by_template: Mapping[str, str]) -> str:
    return fact.relation or by_template.get(_template(fact), _template(fact))


def _template(fact: Fact) -> str:
    """The template without differences of white space."""
    return " ".join(fact.template.split())


def draw_key(seed: int, *texts: str) -> bytes:
    """Sort key of a deterministic shuffle."""
    return hashlib.sha256("\0".join((str(seed), *texts)).encode()).digest()
