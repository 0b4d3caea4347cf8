"""The raw responses as a file for other tools: one row a sample, as JSON lines or Parquet, written as a stream."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._util.data import plain
from .._util.files import atomic_write
from ..errors import KtError, need

if TYPE_CHECKING:
    from .scores import Scores


FORMATS = ("jsonl", "parquet")
"""The values of `--log-samples`."""

_TEXTS = ("record", "role", "kind", "prompt", "answer", "predicted", "exact_text", "text", "wild_text", "mello_text")
_NUMBERS = ("log_prob", "kl")
_BLOCK = 4096
"""Rows of a Parquet row group, which are in memory at once."""


def sample_rows(
    scores: Scores, before: Scores | None = None, decode: Callable[[Sequence[int]], str] | None = None
) -> Iterator[dict[str, Any]]:
    """A row for every sample, in their order.

    Columns: record (the fact's id), role, kind (the data set's own key), prompt, answer, predicted (the teacher-forced
    argmax tokens as text, with `decode`), exact_text, text, wild_text and mello_text (what the model wrote),
    log_prob (joint, natural log), kl (nats), and scores: metric -> this sample's value.

    Args:
        scores: of `evaluate`.
        before: the unedited model's, which locality metrics need.
        decode: token ids to text, as `model.tokenizer.decode`.
    """
    from .metrics import METRICS

    measured = [(name, METRICS[name]) for name in METRICS if name in scores.values]
    old = {} if before is None else {sample.key: sample for sample in before.samples}
    for sample in scores.samples:
        row = {name: getattr(sample, name, None) for name in (*_TEXTS, *_NUMBERS)}
        if decode is not None and sample.predicted_ids:
            row["predicted"] = decode(list(sample.predicted_ids))
        values = ((n, m.score(sample, old.get(sample.key))) for n, m in measured if m.role == sample.role)
        yield row | {"scores": {name: value for name, value in values if value is not None}}


def write_samples(path: str | Path, rows: Iterable[Mapping[str, Any]], format: str = "jsonl") -> Path:
    """Write a stream of rows, the file whole or not at all; only a block of rows is in memory.

    JSON lines take rows of any shape. Parquet takes those of `sample_rows`: one column each, scores as a map.

    Raises:
        KtError: an unknown format, or Parquet without pyarrow.
    """
    if format not in FORMATS:
        raise KtError(f"samples cannot be written as {format!r}; choose {' or '.join(FORMATS)}")
    if format == "parquet":
        return _write_parquet(Path(path), rows)
    return atomic_write(path, lambda temporary: _write_lines(temporary, rows))


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            # ASCII: a lone surrogate in a prompt has no UTF-8, and U+2028 would end a line for some readers.
            file.write(json.dumps(plain(row), ensure_ascii=True, allow_nan=False) + "\n")


def _write_parquet(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    need("pyarrow", "Parquet", instead=", or write JSON lines")
    import pyarrow as arrow
    from pyarrow import parquet

    columns = {name: arrow.string() for name in _TEXTS} | {name: arrow.float64() for name in _NUMBERS}
    schema = arrow.schema([*columns.items(), ("scores", arrow.map_(arrow.string(), arrow.float64()))])
    left = iter(rows)

    def write(temporary: Path) -> None:
        with parquet.ParquetWriter(temporary, schema) as file:
            while block := [_cells(row) for row in islice(left, _BLOCK)]:
                file.write_table(arrow.Table.from_pylist(block, schema=schema))

    return atomic_write(path, write)


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    texts = {name: _encodable(row.get(name)) for name in _TEXTS}
    return texts | {name: row.get(name) for name in _NUMBERS} | {"scores": list(row.get("scores", {}).items())}


def _encodable(text: Any) -> str | None:
    """Parquet is UTF-8: a lone surrogate becomes its escape."""
    return None if text is None else str(text).encode("utf-8", "backslashreplace").decode("utf-8")
