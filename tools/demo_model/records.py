"""The records of facts.jsonl: what the trained model says, with foils, neighbours and second hops."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from demo_data import tables
from demo_data.knowledge import Item
from demo_data.paragraphs import GENERATION_STARTS, OPENERS
from demo_data.templates import HOPS, TEMPLATES
from transformers import PreTrainedTokenizerFast

from .evaluate import Hit

NEIGHBOURS_SAME, NEIGHBOURS_OTHER = 2, 3
MAX_HOPS = 2
Hits = Mapping[tuple[str, str], Hit]


def _opening(item: Item) -> str:
    """The first words of a paragraph on the subject, up to where its answer stands."""
    return OPENERS[item.relation][0].split("{o}")[0].format(s=item.subject).strip()


class RecordMaker:
    """Builds one record per fact that the model knows; everything random is drawn by seed and fact id."""

    def __init__(self, items: Sequence[Item], hits: Hits, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.hits, self.tokenizer, self.seed = hits, tokenizer, seed
        self.known = {item.id: [t for t in item.trained if self._says(item, t)] for item in items}
        # Foils and neighbours come from the facts that have a record; an answer the model never gives is no foil.
        self.answers: dict[str, Counter[str]] = defaultdict(Counter)
        self.by_relation: dict[str, list[Item]] = defaultdict(list)
        for item in items:
            if self.known[item.id]:
                self.answers[item.relation][item.answer] += 1
                self.by_relation[item.relation].append(item)

    def record(self, item: Item) -> dict[str, Any] | None:
        """The record, or None where the model says the answer on none of the trained prompts."""
        if not self.known[item.id]:
            return None
        rng = random.Random(f"{self.seed}/record/{item.id}")
        template = rng.choice(self.known[item.id])
        foil = self._foil(item, rng)
        return {
            "id": item.id,
            "relation": item.relation,
            "prompt": TEMPLATES[item.relation][template],
            "subject": item.subject,
            "answer": item.answer,
            "foil": foil,
            "paraphrases": [TEMPLATES[item.relation][t] for t in item.held_out],
            "neighbourhood": self._neighbours(item, template, rng),
            "portability": self._portability(item, foil),
            "generation": [_opening(item), GENERATION_STARTS[0].format(item.subject)],
        }

    def _says(self, item: Item, template: int) -> bool:
        return self.hits[item.prompt(template), item.answer].full

    def _first(self, answer: str) -> int:
        return self.tokenizer(f" {answer}").input_ids[0]

    def _foil(self, item: Item, rng: random.Random) -> str:
        """Another answer of the relation: a common one where there are such, one that moves a second hop.

        It must differ in the first token, or the logit difference of the first token would be zero.
        """
        counts = self.answers[item.relation]
        common = [answer for answer in counts if counts[answer] >= 2]
        pool = sorted(common if len(common) >= 3 else counts)
        pool = [a for a in pool if a != item.answer and self._first(a) != self._first(item.answer)]
        moving = [a for a in pool if self._moved(item, a)]
        return rng.choice(moving or pool)

    @staticmethod
    def _moved(item: Item, foil: str) -> list[tuple[str, str, str]]:
        """(hop, answer after the edit, answer before) of each held-out hop that the foil changes."""
        before, after = (tables.attributes(item.relation, answer) for answer in (item.answer, foil))
        hops = [hop for hop in item.hops_held_out if hop in after and after[hop] != before[hop]]
        return [(hop, after[hop], before[hop]) for hop in hops]

    def _portability(self, item: Item, foil: str) -> list[dict[str, str]]:
        return [
            {"prompt": HOPS[item.relation][hop].format(item.subject), "answer": after, "original": before}
            for hop, after, before in self._moved(item, foil)[:MAX_HOPS]
        ]

    def _neighbours(self, item: Item, template: int, rng: random.Random) -> list[dict[str, str]]:
        """Prompts on other subjects that the model answers rightly; the same template where they know it."""
        others = [o for o in self.by_relation[item.relation] if o is not item]
        others = [o for o in others if item.subject not in o.subject and o.subject not in item.subject]
        rng.shuffle(others)
        same = [o for o in others if o.answer == item.answer][:NEIGHBOURS_SAME]
        rest = [o for o in others if o.answer != item.answer]
        chosen = same + rest[: NEIGHBOURS_SAME + NEIGHBOURS_OTHER - len(same)]
        found = []
        for other in chosen:
            known = self.known[other.id]
            prompt = other.prompt(template if template in known else rng.choice(known))
            found.append({"prompt": prompt, "answer": other.answer})
        return found
