"""Load facts from a source: the embedded ones, a file, a folder or a Hugging Face data set, in any of the formats.

Records are read one by one, so `limit` also limits the work; only a JSON object around a list is read completely.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from .._util.kinds import takes
from .._util.online import ELSEWHERE, refuse_unreachable, told_offline
from ..errors import BadFact, BadFile, KtError, need, said_by, warn_user
from .fact import Fact, doubts, joined_by
from .files import Located, demo_records, file_records, lre_records
from .formats import Schema, as_record, fits, named, read_record, read_records
from .opening import ENDINGS, ending_of
from .readers.pararel import Patterns
from .record import Choices, Junk, kind
from .shown import Facts

FactsLike: TypeAlias = Fact | Mapping[str, Any] | str | Path | Iterable[Fact | Mapping[str, Any]]
"""One fact or many, as `Fact`s, dicts, or a source by name: what every function that takes facts accepts."""


@takes()
def load_facts(
    source: FactsLike = "demo",
    limit: int | str | None = None,
    format: str | None = None,
    zsre_target: str = "answer",
    known_to: str | None = None,
    join: str | None = None,
) -> list[Fact]:
    """Read facts; their ids become unique.

    Args:
        source: "demo" (the embedded facts), a .json, .jsonl, .ndjson, .csv, .tsv or .parquet file (all but the
            last also as .gz or .zst), a folder of them, "hf:repo[:file]" or "hf:repo:config:split" (needs `datasets`);
            or records in memory: a `Fact` or a dict, or several.
        limit: the first N facts, or "10-20" for the tenth to the twentieth (from 1, both included). Records that are
            left out do not count.
        format: a name of `kt.facts.FORMATS`; without it the records' keys decide, and all must be of one data set.
        zsre_target: the edit target of a zsRE record: "answer" (ROME, MEMIT, JEEP) or "alt" (EasyEdit).
        known_to: read only the records of known_1000 that are flagged as known to this model.
        join: the text between every prompt and its answers ("" for none), where a record has no `target_prefix`; by
            default scripts and open brackets decide.

    Returns:
        The facts, in the source's order; each has an id that no other has.

    Raises:
        BadFile: the source is missing, not text, not JSON or CSV, or without records.
        BadFact, SubjectNotFound: a record is not a fact; the message says which one and why.

    Examples:
        >>> facts = kt.load_facts("demo", limit=2)
        >>> facts[0].subject, facts[0].answer
        ('Afghanistan', 'Kabul')
    """
    return Facts(read_facts(source, limit, format, zsre_target, known_to, join).facts)


@takes()
def read_facts(
    source: FactsLike = "demo",
    limit: int | str | None = None,
    format: str | None = None,
    zsre_target: str = "answer",
    known_to: str | None = None,
    join: str | None = None,
) -> Loaded:
    """`load_facts`, together with counts of the records that were left out, by reason.

    Args:
        source: as in `load_facts`, and so are all other arguments.
        limit: the first N facts, or a range of them: `10-20`.
        format: a name of `kt ls datasets`; None recognises it by the records' keys.
        zsre_target: `answer` or `alt`: what zsRE is edited in.
        known_to: of known_1000, only facts that are flagged as known to this model.
        join: text between prompt and answer; None follows script and brackets.

    Returns:
        `facts`, the list; `skips`, what was left out and why.

    Examples:
        >>> loaded = kt.read_facts([{"prompt": "The capital of {} is", "subject": "France", "answer": "Paris"}])
        >>> len(loaded.facts)
        1
    """
    skips = Skips()
    facts = list(iter_facts(source, limit, format, zsre_target, known_to, skips, join))
    if not facts:
        start, _ = parse_limit(limit)
        problem = f"has no record {start + 1}" if start else "holds no facts"
        skipped = f" ({skips})" if skips.total else ""
        what = source if isinstance(source, str | Path) else "the list given"
        raise BadFile(f"{what} {problem}{skipped}; give a file with at least one record (--limit counts from 1)")
    return Loaded(with_unique_ids(facts), skips)


@takes()
def iter_facts(
    source: FactsLike = "demo",
    limit: int | str | None = None,
    format: str | None = None,
    zsre_target: str = "answer",
    known_to: str | None = None,
    skips: Skips | None = None,
    join: str | None = None,
) -> Iterator[Fact]:
    """`load_facts` one by one, with constant memory; `skips` is updated while the facts are consumed.

    Ids are the data set's own and may repeat (making them unique needs all of them). An empty source yields nothing.

    Args:
        source: as in `load_facts`, and so are all arguments but `skips`.
        limit: the first N facts, or a range of them: `10-20`.
        format: a name of `kt ls datasets`; None recognises it by the records' keys.
        zsre_target: `answer` or `alt`: what zsRE is edited in.
        known_to: of known_1000, only facts that are flagged as known to this model.
        skips: is given the counts of what was left out.
        join: text between prompt and answer; None follows script and brackets.

    Returns:
        The facts, one at a time.

    Examples:
        >>> next(kt.iter_facts("demo")).subject
        'Afghanistan'
    """
    start, stop = parse_limit(limit)
    choices = Choices(zsre_target, known_to, join).checked()
    if format is not None:
        named(format)
    skips = Skips() if skips is None else skips
    return _limited(_facts(_records(source), format, choices, skips), start, stop, skips)


def facts_from(given: FactsLike, format: str | None = None, first: int = 0) -> list[Fact]:
    """The facts that a function of kt is given; a `Fact` passes through unchanged. Ids become unique.

    A record without an id gets its position, counted from `first`. Of records in memory, those that a file reader
    would leave out (`Junk`) are errors, because the caller chose every record; what is left out is said in a warning.

    Args:
        given: one fact or many, as `Fact`s or as dicts in any known format; or what `load_facts` reads by name.

    Raises:
        BadFile, BadFact, SubjectNotFound: it is none of these, or as `load_facts`.
    """
    facts, skips = list[Fact](), Skips()
    if isinstance(given, str | Path):
        loaded = read_facts(given, format=format)
        for line in (*([str(loaded.skips)] if loaded.skips.total else ()), *loaded.skips.noted):
            warn_user(line)
        return loaded.facts
    for index, item in enumerate(one_or_many(given), first):
        record, where = item if isinstance(item, Located) else (item, f"record {index + 1}")
        notes: list[str] = []
        read = [record] if isinstance(record, Fact) else read_records(record, where, format, notes=notes)
        facts.extend(_named(read, index))
        if isinstance(record, Mapping):
            notes += [doubt for fact in read for doubt in doubts(fact)]
        for note in notes:
            skips.note(note, ", ".join([where, *(repr(fact.prompt[:80]) for fact in read[:1])]))
    for line in skips.noted:
        warn_user(line)
    return with_unique_ids(facts)


def distinct_facts(facts: Sequence[Fact], target: bool = True, whole: bool = False) -> list[Fact]:
    """The facts without copies, which are no further evidence; a warning says how many were copies.

    Args:
        target: copies agree not only in prompt, subject and answer (up to white space) but also in the target.
        whole: they also agree in everything that is asked beside the prompt: paraphrases, neighbours, consequences.
    """
    kept: dict[Any, Fact] = {}
    for fact in facts:
        parts = (fact.prompt, fact.subject, fact.answer, fact.target if target else None)
        asked = (fact.rephrasings, fact.neighbours, fact.hops, fact.generation) if whole else ()
        kept.setdefault((*(" ".join((part or "").split()) for part in parts), *asked), fact)
    if copies := len(facts) - len(kept):
        warn_user(
            f"{copies:,} of {len(facts):,} facts are copies of others (the same prompt, subject and answer"
            f"{' and target' if target else ''}) and count once"
        )
    return list(kept.values())


def one_or_many(given: Any) -> Iterable[Any]:
    """The records of a fact, a dict, what `read_facts` gave, or any iterable."""
    if isinstance(given, Fact | Mapping):
        return (given,)
    if isinstance(given, Loaded):
        return given.facts
    if not isinstance(given, Iterable) or isinstance(given, bytes):
        raise BadFact(f"facts are given as {kind(given)}; give a Fact, a dict, a list of them, or a file's name")
    return given


def fact_by_hand(
    prompt: str, subject: str, answer: str | None = None, foil: str | None = None, target: str | None = None
) -> Fact:
    """A fact typed by the user; the prompt marks the subject by `{}` or contains it.

    >>> fact_by_hand("The capital of {} is", "France", "Paris", foil="Rome").prompt
    'The capital of France is'
    """
    record = {"prompt": prompt, "subject": subject, "answer": answer, "foil": foil, "target": target}
    return replace(read_record(record, "the fact given by hand", "kt"), id="by-hand")


def parse_limit(limit: int | str | None) -> tuple[int, int | None]:
    """(start, stop), as for a slice, of a limit: None, 10, "10", or "10-20" (from 1, both included)."""
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
    """Give repeated ids the suffixes "-2", "-3", ..., skipping ids that another fact has."""
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


@dataclass
class Skips:
    """Counts of records, of each format, and of records left out by reason; they grow while a file is read.

    `first` holds the location of the first record of each reason. Reasons are from a fixed set, so the maps stay small.
    """

    records: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)

    def note(self, what: str, where: str) -> None:
        """Count something that was done with a record which its author may not have meant."""
        self.notes[what] += 1
        self.first.setdefault(what, where)

    @property
    def noted(self) -> list[str]:
        """One line for each kind of note."""
        return [f"{what}: {n:,} times (first: {self.first[what]})" for what, n in self.notes.most_common()]

    def add(self, reason: str, where: str) -> None:
        """Count a record that is left out."""
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
        notes = {"notes": self.noted} if self.notes else {}
        return {
            "records": self.records, "formats": dict(self.formats), "skipped": self.total, "reasons": reasons
        } | notes  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """The facts of a source, and counts of the records left out."""

    facts: list[Fact]
    skips: Skips


MOST_UNREAD = 100
"""After so many records that cannot be read, and none that can, a source is not in the format that it seems to have."""


def _facts(
    records: Iterable[Located], format: str | None, choices: Choices, skips: Skips
) -> Iterator[tuple[list[Fact], str]]:
    """The facts of each record, and its location."""
    begins, records = _peeked(records, Schema.N_FIRST if format is None else 0)
    schema, patterns = Schema(begins), Patterns()
    unread: BadFact | None = None
    some = False
    for index, (value, where) in enumerate(records):
        if isinstance(value, Fact):
            yield list(_named([joined_by(value, choices.join)], index)), where
            continue
        if value is None:
            skips.records += 1
            skips.add("a null record", where)
            continue
        try:
            record = as_record(value, where)
        except BadFact:
            if not some or not all(named(name).published for name in skips.formats):
                raise
            skips.records += 1
            skips.add("that are no objects", where)
            continue
        stem = Path(where.rpartition(",")[0]).name.partition(".")[0]
        if patterns.take(record, stem):
            continue
        if record.has("sub_label", "obj_label"):
            value = patterns.given_to(record, stem).data
        name = format or schema.format_of(record)
        skips.records += 1
        skips.formats[name] += 1
        notes: list[str] = []
        try:
            facts = read_records(value, where, name, choices, notes, guessed=format is None)
        except Junk as junk:
            skips.add(junk.reason, where)
            continue
        except BadFact as error:
            unread = unread or error
            if not named(name).published or not (format is None or fits(record, format)):
                raise
            skips.add(f"that cannot be read as {name}", str(error))
            if not some and skips.total >= MOST_UNREAD:
                raise unread from None
            continue
        some = True
        for what in (*notes, *(doubt for fact in facts for doubt in doubts(fact))):
            skips.note(what, where)
        yield list(_named(facts, index)), where
    if unread is not None and not some:
        raise unread


def _peeked(records: Iterable[Located], n: int) -> tuple[list[Any], Iterator[Located]]:
    """The first `n` values, and all records again; what cannot be read is raised where it stands."""
    rest, head, failed = iter(records), list[Located](), list[Exception]()
    try:
        head += islice(rest, n)
    except KtError as error:
        failed.append(error)

    def again() -> Iterator[Located]:
        yield from head
        for error in failed:
            raise error
        yield from rest

    return [item.record for item in head], again()


def _limited(records: Iterable[tuple[list[Fact], str]], start: int, stop: int | None, skips: Skips) -> Iterator[Fact]:
    """The facts from `start` to `stop`. A chain of edits that this cuts loses its questions, which need all of it."""
    at = 0
    for facts, where in records:
        kept = facts[max(0, start - at) : None if stop is None else max(0, stop - at)]
        at += len(facts)
        if len(kept) < len(facts) and any(hop.kind == "multi_hop" for fact in facts for hop in fact.hops):
            if kept:
                skips.note("a chain of edits that --limit cuts, so its multi-hop questions are left out", where)
            kept = [replace(fact, hops=()) for fact in kept]
        yield from kept
        if stop is not None and at >= stop:
            return


def _named(facts: list[Fact], index: int) -> Iterator[Fact]:
    """Give facts without an id their record's position, with a number if the record has several facts."""
    for number, fact in enumerate(facts, 1):
        name = fact.id or (f"{index}-{number}" if len(facts) > 1 else str(index))
        yield fact if fact.id == name else replace(fact, id=name)


def _records(given: FactsLike) -> Iterator[Located]:
    if not isinstance(given, str | Path):
        return (Located(item, f"record {number}") for number, item in enumerate(one_or_many(given), 1))
    source = str(given)
    if not source.strip():  # `Path("")` is the current folder
        raise BadFile(f"facts come from demo, lre, hf:repo[:file], or {', '.join(ENDINGS)} files; give one of them")
    if source == "demo":
        return demo_records()
    if source == "lre":
        return lre_records()
    return hub_records(source) if source.startswith("hf:") else file_records(Path(source))


def hub_records(source: str) -> Iterator[Located]:
    """The records of hf:repo[:file] or hf:repo:config[:split], streamed through `datasets`.

    A last part with one of `ENDINGS` is a file of the repository. Without a split the first one is read.

    Raises:
        BadFile: the `datasets` package is missing, the source names no data set, or reading it failed.
    """
    repo, *parts = source.removeprefix("hf:").split(":")
    need("datasets", source, kind=BadFile)
    import datasets

    if not repo or len(parts) > 2:
        raise BadFile(f"{source!r} names no dataset; write hf:owner/name, with :file.json or :config:split behind it")
    file = parts[0] if len(parts) == 1 and ending_of(Path(parts[0])) in ENDINGS else None
    config, split = (None, None) if file else (*(part or None for part in parts), None, None)[:2]
    number = 0
    refuse_unreachable(source)
    try:
        splits = datasets.load_dataset(repo, config, data_files=file, streaming=True)
        if split is not None and split not in splits:
            raise BadFile(f"{source} has no split {split!r}; there are {', '.join(map(str, splits))}")
        for number, record in enumerate(splits[split] if split else next(iter(splits.values())), 1):
            yield Located(record, f"{source}, record {number}")
    except KtError:
        raise
    except Exception as error:  # the Hub, the network and the file formats raise errors of many types
        message = said_by(error, 200)
        remedy = ELSEWHERE if told_offline() else "check its name and the connection"
        raise BadFile(f"{source} cannot be read after record {number}: {message}; {remedy}") from error
