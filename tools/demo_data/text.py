"""Samples documents: single facts, paragraphs, two-hop sentences, bridges and fillers.

One generator serves training, the key corpus and the held-out text; they differ in the seed and in which templates
of a subject they may use.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from . import paragraphs as words
from . import tables
from .knowledge import Item
from .templates import BRIDGES

# Share of documents, not of tokens: a paragraph is about four times as long as a sentence.
KINDS = {"fact": 0.745, "hop": 0.11, "bridge": 0.03, "paragraph": 0.085, "filler": 0.03}
PREFIX_SHARE = 0.15


@dataclass(frozen=True)
class Document:
    """A text and the character spans of the answers in it, which the loss weights."""

    text: str
    answers: tuple[tuple[int, int], ...] = ()


class Writer:
    """Draws documents about ``items``; ``held_out`` turns to the templates and hops never used in training."""

    def __init__(self, items: Sequence[Item], seed: str, held_out: bool = False) -> None:
        self.rng = random.Random(seed)
        self.items = list(items)
        self.held_out = held_out
        self.bridges = _bridges()
        self.queue: list[tuple[Item, int]] = []
        self.hops = [(i, h) for i in self.items for h in (i.hops_held_out if held_out else i.hops_trained)]

    def document(self) -> Document:
        kind = self.rng.choices(list(KINDS), list(KINDS.values()))[0]
        return getattr(self, f"_{kind}")()

    def _fact(self) -> Document:
        item, template = self._next_pair()
        return self._statement(item.prompt(template), item.answer)

    def _next_pair(self) -> tuple[Item, int]:
        # A shuffled queue rather than draws with replacement: after one pass every pair was seen exactly once.
        if not self.queue:
            self.queue = [(i, t) for i in self.items for t in (i.held_out if self.held_out else i.trained)]
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
        """Text before a prompt, of the kinds that edits use as context: sentences, lead-ins, cut-off fragments."""
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
        sentences = [self.rng.choice(words.OPENERS[item.relation])]
        followers = [f for f in words.FOLLOWERS[item.relation] if _fillable(f, fields)]
        sentences += self.rng.sample(followers, min(len(followers), self.rng.randint(2, 4)))
        draw = self.rng.random()
        start = words.GENERATION_STARTS[0 if draw < 0.4 else 1].format(item.subject) if draw < 0.7 else ""
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
