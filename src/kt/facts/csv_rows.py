"""Records from a CSV or TSV file: one row each, our own keys (or a data set's) as columns."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import BadFile
from .readers.own import LIST_KEYS

FIELD_LIMIT = 1 << 24
"""Characters of one cell; the standard library's own limit is 131,072."""


def csv_records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """(record, where) of each row that is not blank; `where` names the file's line.

    A blank cell is an absent key. A cell of a list column is a JSON list, or texts with `|` between them.

    Raises:
        BadFile: no header, a row of another length, no UTF-8, or a list column that is no list.
    """
    csv.field_size_limit(FIELD_LIMIT)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        header: list[str] = []
        while True:
            where = f"{path}, line {reader.line_num + 1}"
            try:
                row = next(reader, None)
            except UnicodeDecodeError as error:
                raise BadFile(f"{path}: not UTF-8 after line {reader.line_num}; save the file as UTF-8") from error
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
                yield _record(row, header, where), where
        if not header:
            raise BadFile(f"{path} is empty; give a header with prompt and subject, and a row for each fact")


def _header(row: list[str], path: Path) -> list[str]:
    header = [cell.strip() for cell in row]
    twice = [name for name in header if name and header.count(name) > 1]
    if twice:
        raise BadFile(f"{path}: two columns are named {twice[0]!r}; rename or drop one")
    return header


def _record(row: list[str], header: list[str], where: str) -> dict[str, Any]:
    if len(row) != len(header):
        raise BadFile(f"{where}: {len(row)} cells under {len(header)} columns; quote a cell that holds a comma")
    cells = {name: cell for name, cell in zip(header, row, strict=True) if name and cell.strip()}
    return {name: _list(cell, name, where) if name in LIST_KEYS else cell for name, cell in cells.items()}


def _list(cell: str, name: str, where: str) -> list[Any]:
    if not cell.lstrip().startswith("["):
        return [part for part in (p.strip() for p in cell.split("|")) if part]
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{where}: {name!r} begins with [ but is no JSON list; put | between texts instead") from error
    return value if isinstance(value, list) else [value]
