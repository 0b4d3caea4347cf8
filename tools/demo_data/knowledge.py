"""From raw triples to the facts the model is taught: filters, caps, and what is held out.

The LRE files are skewed (64% of the native languages are French) and noisy (escaped unicode, subjects with
two objects, answers that stand inside the subject), so a model taught on them raw learns a prior or a copy
instead of facts. Each filter below removes one of these.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from . import tables
from .templates import HOPS, TEMPLATES

HERE = Path(__file__).parent
HELD_OUT_TEMPLATES = 2
HOP_TRAINED_SHARE = 0.55
MAX_SUBJECT_CHARS = 30


@dataclass(frozen=True)
class Source:
    """One LRE file: its relation here, how many subjects one object may have, and how many facts in all."""

    file: str
    per_object: int
    total: int
    least: int = 1
    stem: int = 5


SOURCES = {
    "headquarters": Source("company_hq", per_object=14, total=190),
    "landmark": Source("landmark_in_country", per_object=16, total=200, least=2),
    "product": Source("product_by_company", per_object=24, total=180, least=2),
    "occupation": Source("person_occupation", per_object=22, total=190, least=4),
    "native_language": Source("person_native_language", per_object=32, total=170, least=2),
    "instrument": Source("person_plays_instrument", per_object=42, total=160, least=5),
    "position": Source("person_plays_position_in_sport", per_object=28, total=180, least=20),
    "sport": Source("person_plays_pro_sport", per_object=32, total=160),
    "ceo": Source("company_ceo", per_object=2, total=80),
    "constellation": Source("star_constellation", per_object=16, total=110, least=2, stem=4),
    "superhero": Source("superhero_person", per_object=1, total=80),
}
ALLOWED: dict[str, set[str]] = {
    "headquarters": set(tables.cities()),
    "landmark": set(tables.countries()),
    "product": set(tables.MAKER_COUNTRY),
    "occupation": set(tables.OCCUPATION_FIELD),
    "position": set(tables.POSITION_SPORT),
}

# Rows whose second hop would be false: the Dublin of Ross Stores is in California.
WRONG = {"Ross Stores"}


@dataclass(frozen=True)
class Item:
    """A fact to be taught; which templates and second hops its subject is trained on, which are held out."""

    id: str
    relation: str
    subject: str
    answer: str
    trained: tuple[int, ...]
    held_out: tuple[int, ...]
    hops_trained: tuple[str, ...]
    hops_held_out: tuple[str, ...]

    def prompt(self, template: int) -> str:
        return TEMPLATES[self.relation][template].format(self.subject)

    def hop(self, name: str) -> tuple[str, str]:
        """The two-hop prompt of that name and its answer."""
        return HOPS[self.relation][name].format(self.subject), tables.attributes(self.relation, self.answer)[name]


def slug(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def select_triples(lre: Path, seed: int) -> dict[str, list[list[str]]]:
    """The filtered (subject, object) pairs of each LRE relation, as ``triples.json`` keeps them."""
    chosen, taken = {}, set[str]()
    for relation, source in SOURCES.items():
        samples = json.loads((lre / f"{source.file}.json").read_text(encoding="utf-8"))["samples"]
        pairs = [(row["subject"].strip(), row["object"].strip()) for row in samples]
        rng = random.Random(f"{seed}/{relation}")
        rows = _cap(_clean(relation, source, pairs, taken), source, rng)
        # The sport of a player with a known position is asked for as a second hop, so it must not be taught
        # outright.
        taken |= {subject for subject, _ in rows} if relation == "position" else set()
        chosen[relation] = sorted([subject, answer] for subject, answer in rows)
    return chosen


def _clean(relation: str, source: Source, pairs: list[tuple[str, str]], taken: set[str]) -> list[tuple[str, str]]:
    objects = defaultdict(set)
    for subject, answer in pairs:
        objects[subject].add(answer)
    rows, seen = [], set[str]()
    for subject, answer in pairs:
        ambiguous = len(objects[subject]) > 1 or not subject[:1].isalnum() or subject in WRONG
        odd = any(mark in subject + answer for mark in ("\\", '"', "{", "}", "|")) or not answer.isascii()
        leaks = answer[: source.stem].lower() in subject.lower() or subject.lower() in answer.lower()
        barred = relation in ALLOWED and answer not in ALLOWED[relation]
        long = not 2 <= len(subject) <= MAX_SUBJECT_CHARS or len(answer) > 24
        if ambiguous or odd or leaks or barred or long or subject.lower() in seen or subject in taken:
            continue
        seen.add(subject.lower())
        rows.append((subject, answer))
    return rows


def _cap(rows: list[tuple[str, str]], source: Source, rng: random.Random) -> list[tuple[str, str]]:
    rng.shuffle(rows)
    counts = Counter(answer for _, answer in rows)
    rows = [row for row in rows if counts[row[1]] >= source.least]
    kept, used = [], Counter[str]()
    for row in rows:
        if used[row[1]] < source.per_object:
            used[row[1]] += 1
            kept.append(row)
    # Past the total, thin the crowded objects first: an object with one subject left is what neighbours
    # cannot use.
    while len(kept) > source.total:
        crowded = used.most_common(1)[0][0]
        kept.remove(next(row for row in reversed(kept) if row[1] == crowded))
        used[crowded] -= 1
    return kept


def load_triples() -> dict[str, list[list[str]]]:
    return json.loads((HERE / "triples.json").read_text(encoding="utf-8"))["relations"]


def build_items(triples: dict[str, list[list[str]]], seed: int) -> list[Item]:
    """All facts, the LRE ones and those of our tables, with their held-out templates and hops drawn."""
    pairs = {relation: [(s, o) for s, o in rows] for relation, rows in triples.items()}
    for column in tables.COUNTRY_COLUMNS:
        pairs[column] = [(name, row[column]) for name, row in tables.countries().items() if column in row]
    pairs["city_country"] = list(tables.cities().items())
    items, ids = [], set[str]()
    for relation in sorted(pairs):
        for subject, answer in sorted(pairs[relation]):
            name = f"{relation.replace('_', '-')}/{slug(subject)}"
            if name in ids:
                continue
            ids.add(name)
            items.append(_item(name, relation, subject, answer, seed))
    return items


def _item(name: str, relation: str, subject: str, answer: str, seed: int) -> Item:
    rng = random.Random(f"{seed}/{name}")
    order = list(range(len(TEMPLATES[relation])))
    rng.shuffle(order)
    known = tables.attributes(relation, answer)
    hops = [hop for hop in HOPS.get(relation, {}) if hop in known]
    trained = [hop for hop in hops if rng.random() < HOP_TRAINED_SHARE]
    return Item(
        id=name,
        relation=relation,
        subject=subject,
        answer=answer,
        trained=tuple(sorted(order[HELD_OUT_TEMPLATES:])),
        held_out=tuple(sorted(order[:HELD_OUT_TEMPLATES])),
        hops_trained=tuple(trained),
        hops_held_out=tuple(hop for hop in hops if hop not in trained),
    )
