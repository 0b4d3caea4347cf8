"""Facts from a source: the embedded ones, a file, a folder, or a Hugging Face data set, in any format of `formats.py`.

Records are read one by one (a file is never held whole, but for a JSON object around a list), so that `limit` also
limits the work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import BadFact, BadFile, KtError, install_hint
from .fact import Fact
from .files import ENDINGS, Located, demo_records, file_records
from .formats import Schema, as_record, named, read_record, read_records
from .readers.choices import Choices
from .record import Junk

# Records from a data set on the Hugging Face Hub, streamed through `datasets`.


def hub_records(source: str) -> Iterator[Located]:
    """The records of the first split of hf:repo[:file].

    Raises:
        BadFile: no `datasets` package, no name, or whatever the Hub, the network and the file formats raise.
    """
    repo, _, file = source.removeprefix("hf:").partition(":")
    try:
        import datasets
    except ImportError as error:
        raise BadFile(f"{source} needs the datasets package; install it with: {install_hint('data')}") from error
    if not repo:
        raise BadFile(f"{source!r} names no dataset; write hf:owner/name or hf:owner/name:file.json")
    number = 0
    try:
        splits = datasets.load_dataset(repo, data_files=file or None, streaming=True)
        for number, record in enumerate(next(iter(splits.values())), 1):
            yield Located(record, f"{source}, record {number}")
    except KtError:
        raise
    except Exception as error:  # the hub, the network and every file format raise their own kinds
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadFile(f"{source} cannot be read after record {number}: {said}") from error


# What was left out of a file and why, counted while the file is read.


@dataclass
class Skips:
    """Counts that grow as a file is read: records, how many of each format, and those left out by reason.

    `first` holds the place of the first record of each reason. One reason that would name a record's own text would
    make as many entries as records; readers give reasons from a fixed set.
    """

    records: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        self.reasons[reason] += 1
        self.first.setdefault(reason, where)

    @property
    def total(self) -> int:
        """Records left out."""
        return self.reasons.total()

    def __str__(self) -> str:
        """One line for a screen, as in "12 of 1,000 records skipped: 12 empty alt (first: a.json, record 3)"."""
        why = ", ".join(f"{n:,} {reason} (first: {self.first[reason]})" for reason, n in self.reasons.most_common())
        return f"{self.total:,} of {self.records:,} records skipped" + (f": {why}" if why else "")

    def to_dict(self) -> dict[str, object]:
        """For results.json."""
        reasons = [{"reason": r, "n": n, "first": self.first[r]} for r, n in self.reasons.most_common()]
        return {"records": self.records, "formats": dict(self.formats), "skipped": self.total, "reasons": reasons}


@dataclass(frozen=True)
class Loaded:
    """The facts of a source, with what was left out of it."""

    facts: list[Fact]
    skips: Skips


def load_facts(
    source: str | Path = "demo",
    limit: int | str | None = None,
    format: str | None = None,
    zsre_target: str = "answer",
    known_to: str | None = None,
) -> list[Fact]:
    """Read facts.

    Args:
        source: "demo" (the embedded facts), a .json, .jsonl, .csv or .tsv file, a folder of them, or "hf:repo[:file]"
            (needs `datasets`).
        limit: the first N facts, or "10-20" for the tenth to the twentieth (from 1, both included). Records that are
            left out do not count.
        format: a name of `kt.facts.FORMATS`; without it the records' keys decide, and all must be of one data set.
        zsre_target: which side of a zsRE record is edited in: "answer" (ROME, MEMIT, JEEP) or "alt" (EasyEdit).
        known_to: of known_1000, only the facts whose flag says that this model knows them.

    Raises:
        BadFile: missing, not text, not JSON or CSV, or without records.
        BadFact, SubjectNotFound: a record that is no fact; the message says which one and why.
    """
    return read_facts(source, limit, format, zsre_target, known_to).facts


def read_facts(
    source: str | Path = "demo",
    limit: int | str | None = None,
    format: str | None = None,
    zsre_target: str = "answer",
    known_to: str | None = None,
) -> Loaded:
    """`load_facts`, together with what was left out and why."""
    skips = Skips()
    facts = list(iter_facts(source, limit, format, zsre_target, known_to, skips))
    if not facts:
        start, _ = parse_limit(limit)
        found = f"has no record {start + 1}" if start else "holds no facts"
        left = f" ({skips})" if skips.total else ""
        raise BadFile(f"{source} {found}{left}; give a file with at least one record (--limit counts from 1)")
    return Loaded(with_unique_ids(facts), skips)


def iter_facts(
    source: str | Path = "demo",
    limit: int | str | None = None,
    format: str | None = None,
    zsre_target: str = "answer",
    known_to: str | None = None,
    skips: Skips | None = None,
) -> Iterator[Fact]:
    """`load_facts` one by one, in flat memory; `skips` counts while the facts are taken.

    Ids are the data set's own and may repeat (making them unique takes all of them). An empty source yields nothing.
    """
    start, stop = parse_limit(limit)
    choices = Choices(zsre_target, known_to).checked()
    if format is not None:
        named(format)
    facts = _facts(_records(str(source)), format, choices, Skips() if skips is None else skips)
    return islice(facts, start, stop)


def facts_from(
    records: Iterable[Fact | Mapping[str, Any] | Located], format: str | None = None, first: int = 0
) -> list[Fact]:
    """Facts from records that are in memory already; a `Fact` passes through. Ids become unique.

    A record without an id gets its position, counted from `first`. There is no junk here: who hands over a record in
    code wants that record, so one that a file would leave out is an error.
    """
    facts: list[Fact] = []
    for index, item in enumerate(records, first):
        record, where = item if isinstance(item, Located) else (item, f"record {index + 1}")
        found = [record] if isinstance(record, Fact) else read_records(record, where, format)
        facts.extend(_named(found, index))
    return with_unique_ids(facts)


def fact_by_hand(
    prompt: str, subject: str, answer: str | None = None, foil: str | None = None, target: str | None = None
) -> Fact:
    """A fact typed by the user; the prompt marks the subject by `{}` or contains it.

    >>> fact_by_hand("The capital of {} is", "France", "Paris", foil="Rome").prompt
    'The capital of France is'
    """
    given = {"prompt": prompt, "subject": subject, "answer": answer, "foil": foil, "target": target}
    return replace(read_record(given, "the fact given by hand", "kt"), id="by-hand")


def parse_limit(limit: int | str | None) -> tuple[int, int | None]:
    """(start, stop) of a limit: None, 10, "10", or "10-20" (from 1, both included, as `inspect` has it)."""
    if limit is None:
        return 0, None
    head, dash, tail = str(limit).strip().partition("-")
    parts = (head, tail) if dash else ("1", head)
    if all(p.strip().isascii() and p.strip().isdigit() and len(p) < 10 for p in parts):
        low, high = (int(p) for p in parts)
        if 1 <= low <= high:
            return low - 1, high
    raise BadFact(f"limit {limit!r} is not understood; give a number from 1 (100) or a range (10-20)")


def with_unique_ids(facts: list[Fact]) -> list[Fact]:
    """The second fact of an id gets the suffix "-2", and so on, past every id that stands in the file."""
    taken, seen, last, unique = {f.id for f in facts}, set(), dict[str, int](), []
    for fact in facts:
        name, number = fact.id, last.get(fact.id, 1)
        while name in seen or (number > 1 and name in taken):
            number += 1
            name = f"{fact.id}-{number}"
        last[fact.id] = number
        seen.add(name)
        unique.append(fact if fact.id == name else replace(fact, id=name))
    return unique


def _facts(records: Iterable[Located], format: str | None, choices: Choices, skips: Skips) -> Iterator[Fact]:
    schema = Schema()
    for index, (value, where) in enumerate(records):
        name = format or schema.format_of(as_record(value, where))
        skips.records += 1
        skips.formats[name] += 1
        try:
            facts = read_records(value, where, name, choices)
        except Junk as junk:
            skips.add(junk.reason, where)
            continue
        yield from _named(facts, index)


def _named(facts: list[Fact], index: int) -> Iterator[Fact]:
    """Facts without an id get their record's position, and their own in it where there are several."""
    for number, fact in enumerate(facts, 1):
        name = fact.id or (f"{index}-{number}" if len(facts) > 1 else str(index))
        yield fact if fact.id == name else replace(fact, id=name)


def _records(source: str) -> Iterator[Located]:
    if not source.strip():  # to `Path` it would be the current folder
        raise BadFile(f"facts come from demo, hf:repo[:file], or {', '.join(ENDINGS)} files; give one of them")
    if source == "demo":
        return demo_records()
    return hub_records(source) if source.startswith("hf:") else file_records(Path(source))
