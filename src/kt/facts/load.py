"""Facts from files: the embedded ones, JSON, JSONL, or a Hugging Face dataset, in any format of `formats.py`.

Records are read one by one (a JSONL file is never held whole), so that `limit` also limits the work.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import BadFact, BadFile, KtError
from .fact import Fact
from .formats import read_record
from .record import kind

LIST_KEYS = ("data", "facts", "requests", "records")
"""Keys under which a JSON object may hold its list of records."""


class Located(NamedTuple):
    """A record and the words that say where it stands."""

    record: Any
    where: str


def load_facts(source: str | Path = "demo", limit: int | str | None = None, format: str | None = None) -> list[Fact]:
    """Read facts.

    Args:
        source: "demo" (the embedded facts), a .json or .jsonl file, or "hf:repo[:file]" (needs `datasets`).
        limit: the first N records, or "10-20" for the tenth to the twentieth (from 1, both included).
        format: a name of `kt.facts.FORMATS`; without it each record's keys decide.

    Raises:
        BadFile: missing, not text, not JSON, or without records.
        BadFact, SubjectNotFound: a record that is no fact; the message says which one and why.
    """
    start, stop = parse_limit(limit)
    facts = facts_from(islice(_records(str(source)), start, stop), format, first=start)
    if not facts:
        found = f"has no record {start + 1}" if start else "holds no facts"
        raise BadFile(f"{source} {found}; give a file with at least one record (--limit counts from 1)")
    return facts


def facts_from(
    records: Iterable[Fact | Mapping[str, Any] | Located], format: str | None = None, first: int = 0
) -> list[Fact]:
    """Facts from records that are in memory already; a `Fact` passes through. Ids become unique.

    A record without an id gets its position, counted from `first`.
    """
    facts: list[Fact] = []
    for index, item in enumerate(records, first):
        record, where = item if isinstance(item, Located) else (item, f"record {index + 1}")
        fact = record if isinstance(record, Fact) else read_record(record, where, format)
        facts.append(_renamed(fact, fact.id or str(index)))
    return _with_unique_ids(facts)


def fact_by_hand(
    prompt: str, subject: str, answer: str | None = None, foil: str | None = None, target: str | None = None
) -> Fact:
    """A fact typed by the user; the prompt marks the subject by `{}` or contains it.

    >>> fact_by_hand("The capital of {} is", "France", "Paris", foil="Rome").prompt
    'The capital of France is'
    """
    given = {"prompt": prompt, "subject": subject, "answer": answer, "foil": foil, "target": target}
    return _renamed(read_record(given, "the fact given by hand", "kt"), "by-hand")


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


def _records(source: str) -> Iterator[Located]:
    if source == "demo":
        demo = resources.files("kt") / "demo" / "facts.jsonl"
        with resources.as_file(demo) as path:
            yield from _lines(path, "demo facts")
    elif source.startswith("hf:"):
        yield from _hub_records(source)
    else:
        yield from _file_records(Path(source))


def _file_records(path: Path) -> Iterator[Located]:
    if path.suffix.lower() not in (".json", ".jsonl"):
        raise BadFile(f"{path}: facts are read from .json or .jsonl files, from `demo` or from hf:repo[:file]")
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise BadFile(f"{path} {what}; give the path of a .json or .jsonl file")
    if path.suffix.lower() == ".jsonl":
        yield from _lines(path, str(path))
        return
    text = _decode(path, _bytes(path))
    if not text.strip():
        raise BadFile(f"{path} is empty; give a JSON list of records")
    value = _parse(text, str(path))
    for number, record in enumerate(_list_in(value, path), 1):
        yield Located(record, f"{path}, record {number}")


def _lines(path: Path, name: str) -> Iterator[Located]:
    """One record per line; blank lines are passed over but counted."""
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                where = f"{name}, line {number}"
                text = _decode(where, line)
                if text.strip():
                    yield Located(_parse(text, where, one_line=True), where)
    except OSError as error:
        raise BadFile(f"{name} cannot be read: {error.strerror or error}") from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror or error}") from error


def _decode(where: object, raw: bytes) -> str:
    if b"\0" in raw:
        raise BadFile(f"{where}: holds NUL bytes, so it is no text; give UTF-8 JSON")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadFile(f"{where}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error


def _parse(text: str, where: str, one_line: bool = False) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if one_line else f"line {error.lineno}, column {error.colno}"
        hint = "; one record per line needs the ending .jsonl" if error.msg == "Extra data" and not one_line else ""
        raise BadFile(f"{where}: not JSON at {place}: {error.msg}{hint}") from error
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{where}: JSON with a number too long or brackets too deep to read") from error


def _list_in(value: Any, path: Path) -> list[Any]:
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        for key in LIST_KEYS:
            if isinstance(value.get(key), list):
                return value[key]
        if "prompt" in value or "requested_rewrite" in value:
            return [value]
    raise BadFile(
        f"{path}: the top level is {kind(value)}, not a list of records (nor an object with one under "
        f"{', '.join(LIST_KEYS)})"
    )


def _hub_records(source: str) -> Iterator[Located]:
    """The first split of a Hugging Face dataset, streamed."""
    repo, _, file = source.removeprefix("hf:").partition(":")
    try:
        import datasets
    except ImportError as error:
        raise BadFile(f"{source} needs the datasets package; install it with: pip install 'kt[data]'") from error
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


def _renamed(fact: Fact, id: str) -> Fact:
    return fact if fact.id == id else replace(fact, id=id)


def _with_unique_ids(facts: list[Fact]) -> list[Fact]:
    """The second fact of an id gets the suffix "-2", and so on, past every id that stands in the file."""
    taken, seen, unique = {f.id for f in facts}, set(), []
    for fact in facts:
        name, number = fact.id, 2
        while name in seen or (number > 2 and name in taken):
            name, number = f"{fact.id}-{number}", number + 1
        seen.add(name)
        unique.append(_renamed(fact, name))
    return unique
