"""Records from files, one by one: JSON lists, JSON lines, CSV, Parquet, also compressed, and folders of them."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
from collections.abc import Iterator
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import BadFile, need, said_by
from . import json_stream
from .opening import ENDINGS, damaged, ending_of, lines_of, open_bytes, refuse_disguised
from .readers.own import LIST_KEYS
from .record import kind, names

FIELD_LIMIT = 1 << 24
"""Most characters in a CSV cell; the standard library's default is 131,072."""


def csv_records(path: Path) -> Iterator[Located]:
    """The records of a CSV or TSV file: a row each, with the keys of a format as columns.

    The delimiter is that of the ending, or a semicolon, tab or comma where the header has only that. A blank cell is an
    absent key, and so is one of `ABSENT`. A cell that is written as a list or object, as JSON or as Python writes it,
    is one (a prompt or a subject never is); any other cell of a list column holds texts separated by `|`.

    Raises:
        BadFile: no header, a row of another length, not UTF-8, or a list column without a list.
    """
    csv.field_size_limit(FIELD_LIMIT)
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="") as stream:
        reader: Any = None
        header: list[str] = []
        while True:
            where = f"{path}, line {1 + (reader.line_num if reader else 0)}"
            try:
                reader = reader or _reader(lines_of(stream, path), path)
                row = next(reader, None)
            except UnicodeDecodeError as error:
                line = reader.line_num if reader else 0
                raise BadFile(f"{path}: not UTF-8 after line {line}; save the file as UTF-8") from error
            except csv.Error as error:
                raise BadFile(
                    f"{where}: not CSV: {error}; quote a cell that holds a comma, a quote or a line"
                ) from error
            if row is None:
                break
            if any("\0" in cell for cell in row):
                raise BadFile(f"{where}: holds NUL bytes, so it is no text; give UTF-8 CSV")
            if not any(cell.strip() for cell in row):
                continue
            if not header:
                header = _header(row, path)
            else:
                yield Located(_record(row, header, where), where)
        if not header:
            raise BadFile(f"{path} is empty; give a header with prompt and subject, and a row for each fact")


def _reader(lines: Iterator[str], path: Path) -> Any:
    """A CSV reader with the delimiter that the header has."""
    first = next((line for line in lines if line.strip()), "")
    own = "\t" if ending_of(path) == ".tsv" else ","
    delimiter = next((mark for mark in (own, ";", "\t", ",") if mark in first), own)
    return csv.reader(chain([first], lines), delimiter=delimiter, strict=True, skipinitialspace=True)


def _header(row: list[str], path: Path) -> list[str]:
    header = [cell.strip() for cell in row]
    twice = [name for name in header if name and header.count(name) > 1]
    if twice:
        raise BadFile(f"{path}: two columns are named {twice[0]!r}; rename or drop one")
    return header


def _record(row: list[str], header: list[str], where: str) -> dict[str, Any]:
    if len(row) != len(header):
        raise BadFile(f"{where}: {len(row)} cells under {len(header)} columns; quote a cell that holds a comma")
    cells = {n: cell for n, cell in zip(header, row, strict=True) if n and cell.strip() and cell.strip() not in ABSENT}
    return {name: _list(cell, name, where) if name in LIST_KEYS else _value(cell, name) for name, cell in cells.items()}


def _value(cell: str, name: str) -> Any:
    """The list or object that a cell holds, else its text."""
    text = cell.strip()
    if name in TEXT_COLUMNS or text[:1] + text[-1:] not in ("[]", "{}", "()"):
        return cell
    if "," not in text:
        text = _ARRAY_GAP.sub(r"\1, \2", text)  # numpy writes ['a' 'b']
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list | dict):
            return value
        if isinstance(value, tuple | set) and value and all(isinstance(item, str) for item in value):
            return list(value) if isinstance(value, tuple) else sorted(value, key=text.find)
    return cell


def _list(cell: str, name: str, where: str) -> list[Any]:
    if not cell.lstrip().startswith("["):
        return [part for part in (p.strip() for p in cell.split("|")) if part]
    value = _value(cell, name)
    if isinstance(value, str):
        raise BadFile(f"{where}: {name!r} begins with [ but is no JSON list; put | between texts instead")
    return value if isinstance(value, list) else [value]


ABSENT = frozenset({"nan", "NaN", "null", "NULL", "None", "<NA>"})
"""Cells that stand for no value, as pandas reads them by default."""
TEXT_COLUMNS = frozenset({"prompt", "subject", "question", "src", "text", "update"})
"""Columns whose cells are text, whatever they look like."""
_ARRAY_GAP = re.compile(r"""(['"])\s+(['"])""")

RECORD_LIST_KEYS = ("data", "facts", "requests", "records")
"""Keys under which a JSON object may hold its list of records."""

RECORD_KEYS = ("prompt", "requested_rewrite", "samples", "src", "edit", "question", "update", "edits")
"""Keys that show a JSON object to be one record itself."""


class Located(NamedTuple):
    """A record and its location in words (`facts.json, record 3`)."""

    record: Any
    where: str


def file_records(path: Path) -> Iterator[Located]:
    """The records of a file, or of a folder's files in the order of their names.

    Raises:
        BadFile: the file is missing, not text, or not in the format of its ending.
    """
    if path.is_dir():
        # ParaRel's patterns stand in other files than the facts that they word, and are read before them.
        files = sorted((p for p in path.rglob("*") if _is_data(p, path)), key=lambda p: (not _has_patterns(p), p))
        for file in files:
            if not file.resolve().is_relative_to(path.resolve()):
                raise BadFile(f"{file} is a link that leads out of its folder; give the file itself")
        if not files:
            raise BadFile(f"{path} is a folder without {', '.join(ENDINGS)} files; give a file of facts")
        for file in files:
            yield from file_records(file)
        return
    if path.suffix == ".safetensors":
        raise BadFile(f"{path}: holds tensors and no facts; an edit is given by --edit, a model's folder by --model")
    if ending_of(path) not in ENDINGS:
        raise BadFile(
            f"{path}: facts are read from {', '.join(ENDINGS)} files (the text ones also as .gz or .zst), from `demo`, "
            "`lre` or from hf:repo[:file]; a prompt by hand has its subject beside it (--prompt, kt.Fact)"
        )
    if not path.is_file():
        raise BadFile(f"{path} does not exist; give the path of a file with one of the endings {', '.join(ENDINGS)}")
    try:
        yield from _records(path)
    except OSError as error:
        raise BadFile(
            f"{path} cannot be read: {error.strerror or error}; check the path and its permissions"
        ) from error
    except damaged() as error:
        raise BadFile(f"{path} cannot be decompressed: {error or 'it is cut off'}; fetch it again") from error


def _is_data(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and ending_of(path) in ENDINGS and not path.is_dir()


def _has_patterns(path: Path) -> bool:
    return path.parent.name in ("graphs_json", "pattern_data", "patterns") or path.stem == "relations"


def demo_records() -> Iterator[Located]:
    """The embedded facts."""
    with resources.as_file(resources.files("kt") / "demo" / "facts.jsonl") as path:
        yield from _lines(path, "demo facts")


def lre_records() -> Iterator[Located]:
    """The shipped real facts: triples of the LRE data set (MIT, demo/LICENSE-LRE) under prompts of our own, one of each
    relation in turn. The foil is another answer of the relation; neighbours are its next three subjects."""
    text = (resources.files("kt") / "demo" / "lre.json").read_text(encoding="utf-8")
    relations = json.loads(text)["relations"]
    for number in range(max(len(relation["pairs"]) for relation in relations.values())):
        for name, relation in relations.items():
            pairs, (prompt, *others) = relation["pairs"], relation["prompts"]
            if number >= len(pairs):
                continue
            subject, answer = pairs[number]
            following = [*pairs[number + 1 :], *pairs[:number]]
            near = [{"prompt": prompt.replace("{}", s), "answer": a} for s, a in following[:3]]
            record = {"id": f"{name}/{number}", "relation": name, "prompt": prompt, "subject": subject}
            record |= {"answer": answer, "foil": next(a for _, a in following if a != answer)}
            yield Located(record | {"paraphrases": others, "neighbourhood": near}, f"lre, {name} {number + 1}")


def _records(path: Path) -> Iterator[Located]:
    ending = ending_of(path)
    if ending in (".jsonl", ".ndjson"):
        yield from _lines(path, str(path))
    elif ending == ".parquet":
        yield from _parquet(path)
    elif ending != ".json":
        yield from csv_records(path)
    else:
        records = json_stream.items(path) if json_stream.is_list(path) else _list_in_object(path)
        for number, record in enumerate(records, 1):
            yield Located(record, f"{path}, record {number}")


def _lines(path: Path, name: str) -> Iterator[Located]:
    """One record per line; blank lines are skipped but count as lines."""
    begun = False
    with open_bytes(path) as stream:
        for number, line in enumerate(lines_of(stream, path), 1):
            where = f"{name}, line {number}"
            text = _decode(line, where)
            if text.strip():
                whole = not begun and text.strip()[0] in "[{" and len(text.strip()) == 1
                begun = True
                if whole:
                    raise BadFile(f"{where}: a JSON value of several lines, not one a line; it needs the ending .json")
                yield Located(_parse(text, where), where)


def _parquet(path: Path) -> Iterator[Located]:
    need("pyarrow.parquet", str(path), kind=BadFile)
    import pyarrow.parquet as parquet

    refuse_disguised(path)
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for record in batch.to_pylist():
                    number += 1
                    yield Located(record, f"{path}, record {number}")
    except OSError:
        raise
    except Exception as error:  # pyarrow raises errors of many types
        why = said_by(error, 200)
        raise BadFile(f"{path} is not Parquet after record {number}: {why}; fetch or write it again") from error


def _list_in_object(path: Path) -> list[Any]:
    """The list in a JSON object, or the object itself if it is a record."""
    value = json_stream.lone_value(path)
    if isinstance(value, dict):
        for key in RECORD_LIST_KEYS:
            if isinstance(value.get(key), list):
                return list(value[key])
        if rows := _rows(value):
            return rows
        if any(key in value for key in RECORD_KEYS):
            return [value]
    told = f" with {names(value)}" if isinstance(value, dict) and value else ""
    raise BadFile(
        f"{path}: the top level is {kind(value)}{told}, not a list of records (nor an object with one under "
        f"{', '.join(RECORD_LIST_KEYS)}); put the records into one list, see docs/data.md"
    )


def _rows(value: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a table by columns ({"prompt": [...], "subject": [...]}, or pandas' {"0": ...} in place of lists)."""
    prompts, subjects = value.get("prompt"), value.get("subject")
    if not isinstance(prompts, list | dict) or not isinstance(subjects, list | dict) or len(subjects) != len(prompts):
        return []
    columns = {
        k: list(v.values()) if isinstance(v, dict) else v for k, v in value.items() if isinstance(v, list | dict)
    }
    columns = {name: column for name, column in columns.items() if len(column) == len(prompts)}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _decode(raw: bytes, where: str) -> str:
    if b"\0" in raw:
        raise BadFile(f"{where}: holds NUL bytes, so it is no text; give UTF-8 JSON")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadFile(f"{where}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = (
            "; a JSON list needs the ending .json"
            if text.lstrip().startswith("[")
            else "; mend the line or leave it out"
        )
        raise BadFile(f"{where}: not JSON at column {error.colno}: {error.msg}{hint}") from error
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{where}: {json_stream.TOO_MUCH}") from error
