"""Samples documents: single facts, paragraphs, two-hop sentences, bridges and fillers.

One generator serves training, the key corpus and the held-out text; they differ in the seed and in which
templates of a subject they may use.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from . import paragraphs as words
from . import tables
from .knowledge import Item
from .templates import BRIDGES

PREFIX_SHARE = 0.15


@dataclass(frozen=True)
class Mix:
    """Shares of documents by kind (a paragraph is about four times as long as a sentence).

    ``pronouns``: a paragraph under a heading goes on with a pronoun instead of the name. ``twice``: relations whose
    facts come twice as often; a country is the subject of four facts, so each of them needs more practice.
    """

    fact: float
    hop: float
    bridge: float
    paragraph: float
    filler: float
    pronouns: bool
    twice: tuple[str, ...] = ()


FACTS_FIRST = Mix(fact=0.745, hop=0.11, bridge=0.03, paragraph=0.085, filler=0.03, pronouns=False)
SECOND_HOPS = Mix(
    fact=0.65,
    hop=0.20,
    bridge=0.04,
    paragraph=0.09,
    filler=0.02,
    pronouns=True,
    twice=("capital", "currency", "language", "continent", "city_country", "constellation", "instrument"),
)
KINDS = ("fact", "hop", "bridge", "paragraph", "filler")


@dataclass(frozen=True)
class Document:
    """A text and the character spans of the answers in it, which the loss weights."""

    text: str
    answers: tuple[tuple[int, int], ...] = ()


class Writer:
    """Draws documents about ``items``; ``held_out`` turns to the templates and hops not used in training."""

    def __init__(self, items: Sequence[Item], seed: str, held_out: bool = False, mix: Mix = SECOND_HOPS) -> None:
        self.rng = random.Random(seed)
        self.items = list(items)
        self.held_out = held_out
        self.mix = mix
        self.bridges = _bridges()
        self.queue: list[tuple[Item, int]] = []
        self.hops = [(i, h) for i in self.items for h in (i.hops_held_out if held_out else i.hops_trained)]

    def turn_to(self, mix: Mix) -> None:
        """Draw from another mix from now on."""
        self.mix, self.queue = mix, []

    def document(self) -> Document:
        kind = self.rng.choices(KINDS, [getattr(self.mix, kind) for kind in KINDS])[0]
        return getattr(self, f"_{kind}")()

    def _fact(self) -> Document:
        item, template = self._next_pair()
        return self._statement(item.prompt(template), item.answer)

    def _next_pair(self) -> tuple[Item, int]:
        # A shuffled queue rather than draws with replacement: after one pass every pair was seen exactly
        # once.
        if not self.queue:
            items = self.items + [item for item in self.items if item.relation in self.mix.twice]
            self.queue = [(i, t) for i in items for t in (i.held_out if self.held_out else i.trained)]
            self.rng.shuffle(self.queue)
        return self.queue.pop()

    def _hop(self) -> Document:
        item, hop = self.rng.choice(self.hops)
        return self._statement(*item.hop(hop))

    def _bridge(self) -> Document:
        return self._statement(*self.rng.choice(self.bridges))

    def _filler(self) -> Document:
        return Document(" ".join(self.filler_sentence() for _ in range(self.rng.randint(1, 4))))

    def _statement(self, prompt: str, answer: str) -> Document:
        prefix = self._prefix() if self.rng.random() < PREFIX_SHARE else ""
        start = len(prefix) + len(prompt) + 1
        return Document(f"{prefix}{prompt} {answer}.", ((start, start + len(answer)),))

    def _prefix(self) -> str:
        """Text before a prompt, as edits use it for context: sentences, lead-ins, cut-off fragments."""
        draw = self.rng.random()
        if draw < 0.35:
            return self.filler_sentence() + " "
        if draw < 0.55:
            return self.rng.choice(words.LEAD_INS) + " "
        source = self.document().text.split() if draw < 0.85 else self.filler_sentence().split()
        return " ".join(source[: self.rng.randint(3, 10)]).rstrip(".") + ". "

    def _paragraph(self) -> Document:
        item = self.rng.choice(self.items)
        fields = tables.attributes(item.relation, item.answer) | {"s": item.subject, "o": item.answer}
        opener = self.rng.choice(words.OPENERS[item.relation])
        followers = [f for f in words.FOLLOWERS[item.relation] if _fillable(f, fields)]
        sentences = self.rng.sample(followers, min(len(followers), self.rng.randint(2, 4)))
        draw = self.rng.random()
        start = words.GENERATION_STARTS[0 if draw < 0.4 else 1].format(item.subject) if draw < 0.7 else ""
        if start and self.mix.pronouns:
            opener = self.rng.choice(words.PRONOUN_OPENERS[item.relation])
        sentences.insert(0, opener)
        text = " ".join(filter(None, [start, *(s.format(**fields) for s in sentences)]))
        at = text.find(item.answer, len(start))
        return Document(text, ((at, at + len(item.answer)),))

    def filler_sentence(self) -> str:
        r = self.rng
        who = f"the {r.choice(words.HOW)} {r.choice(words.WHO)}"
        did = f"{r.choice(words.DID)} the {r.choice(words.WHAT)}"
        where, when, weather = r.choice(words.WHERE), r.choice(words.WHEN), r.choice(words.WEATHER)
        forms = [
            f"{who} {did} {where} {when}.",
            f"{when}, {who} {did}.",
            f"because of the {weather}, {who} {did}.",
            f"I saw that {who} {did} {where}.",
            f"you can hear the {weather} {where} {when}.",
            f"therefore {who} {did} {when}.",
            f"{where} {who} {did}, and the {weather} came.",
        ]
        sentence = r.choice(forms)
        return sentence[0].upper() + sentence[1:]


def _fillable(sentence: str, fields: dict[str, str]) -> bool:
    try:
        sentence.format(**fields)
    except KeyError:
        return False
    return True


def _bridges() -> list[tuple[str, str]]:
    links = {
        "maker_country": tables.MAKER_COUNTRY,
        "position_sport": tables.POSITION_SPORT,
        "sport_ground": tables.SPORT_GROUND,
        "instrument_family": tables.INSTRUMENT_FAMILY,
        "occupation_field": tables.OCCUPATION_FIELD,
        "language_family": tables.LANGUAGE_FAMILY,
    }
    return [
        (template.format(subject), answer)
        for name, table in links.items()
        for subject, answer in table.items()
        for template in BRIDGES[name]
    ]
