"""Records from files, one by one: JSON lists, JSON lines, CSV, a folder of them, and the embedded facts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import BadFile
from . import json_stream
from .csv_rows import csv_records
from .record import kind

RECORD_LIST_KEYS = ("data", "facts", "requests", "records")
"""Keys under which a JSON object may hold its list of records."""

RECORD_KEYS = ("prompt", "requested_rewrite", "samples", "src", "edit")
"""Keys that show a JSON object to be one record itself."""

ENDINGS = (".json", ".jsonl", ".csv", ".tsv")


class Located(NamedTuple):
    """A record and the words that say where it stands."""

    record: Any
    where: str


def file_records(path: Path) -> Iterator[Located]:
    """The records of a file, or of a folder's files in the order of their names.

    Raises:
        BadFile: missing, not text, not what its ending says.
    """
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in ENDINGS and not p.is_dir())
        for file in files:
            if not file.resolve().is_relative_to(path.resolve()):
                raise BadFile(f"{file} is a link that leads out of its folder; give the file itself")
        if not files:
            raise BadFile(f"{path} is a folder without {', '.join(ENDINGS)} files; give a file of facts")
        for file in files:
            yield from file_records(file)
        return
    if path.suffix.lower() not in ENDINGS:
        raise BadFile(f"{path}: facts are read from {', '.join(ENDINGS)} files, from `demo` or from hf:repo[:file]")
    if not path.is_file():
        raise BadFile(f"{path} does not exist; give the path of a file with one of the endings {', '.join(ENDINGS)}")
    try:
        yield from _records(path)
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror or error}") from error


def demo_records() -> Iterator[Located]:
    """The embedded facts."""
    with resources.as_file(resources.files("kt") / "demo" / "facts.jsonl") as path:
        yield from _lines(path, "demo facts")


def _records(path: Path) -> Iterator[Located]:
    ending = path.suffix.lower()
    if ending == ".jsonl":
        yield from _lines(path, str(path))
    elif ending != ".json":
        yield from (Located(record, where) for record, where in csv_records(path))
    else:
        found = json_stream.items(path) if json_stream.is_list(path) else _whole(path)
        for number, record in enumerate(found, 1):
            yield Located(record, f"{path}, record {number}")


def _lines(path: Path, name: str) -> Iterator[Located]:
    """One record per line; blank lines are passed over but counted."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            where = f"{name}, line {number}"
            text = _decode(where, line)
            if text.strip():
                yield Located(_parse(text, where, one_line=True), where)


def _whole(path: Path) -> list[Any]:
    """The list in a JSON object, or the object itself where it is a record."""
    text = _decode(path, path.read_bytes())
    if not text.strip():
        raise BadFile(f"{path} is empty; give a JSON list of records")
    value = _parse(text, str(path))
    if isinstance(value, dict):
        for key in RECORD_LIST_KEYS:
            if isinstance(value.get(key), list):
                return list(value[key])
        if any(key in value for key in RECORD_KEYS):
            return [value]
    raise BadFile(
        f"{path}: the top level is {kind(value)}, not a list of records (nor an object with one under "
        f"{', '.join(RECORD_LIST_KEYS)})"
    )


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
        hint = json_stream.HINT if error.msg == "Extra data" and not one_line else ""
        raise BadFile(f"{where}: not JSON at {place}: {error.msg}{hint}") from error
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{where}: {json_stream.TOO_MUCH}") from error
