"""Opening a file of records: its format by its name, decompressed, and refused where it is not what its name says."""

from __future__ import annotations

import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, AnyStr, BinaryIO, cast

from .._util.data import DISGUISES, PAGE, SERVERS_ANSWER
from ..errors import BadFile

TEXT_ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
ENDINGS = (*TEXT_ENDINGS, ".parquet")
COMPRESSED = (".gz", ".zst")
"""What may stand behind one of `TEXT_ENDINGS`."""
LONGEST_ANSWER = 60
"""Bytes of a file that is nothing but a server's message."""
LARGEST = 1 << 30
"""Most bytes (or characters) of one record: a small compressed file may hold more than any memory."""


def ending_of(path: Path) -> str:
    """The ending that tells the format, in lower case and without `.gz` or `.zst`."""
    suffix = path.suffix.lower()
    inner = Path(path.stem).suffix.lower()
    return inner if suffix in COMPRESSED and inner in TEXT_ENDINGS else suffix


def refuse_disguised(path: Path) -> None:
    """Refuse a file that its first bytes show to be something else than its name says.

    Raises:
        BadFile: a Git LFS pointer, an HTML page, or a file with another format's ending.
        OSError: the file cannot be read.
    """
    with path.open("rb") as stream:
        start = stream.read(128).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if b"annex/objects/" in start and b"{" not in start:
        raise BadFile(f"{path} is a git-annex pointer, not the data; fetch the file itself (git annex get)")
    if start.startswith(b"<") and not start.startswith(b"<?xml") and ending_of(path) in ENDINGS:
        raise BadFile(f"{path} is {PAGE[1]}")
    for magic, (ending, what) in DISGUISES.items():
        whole = what is not SERVERS_ANSWER or len(start) < LONGEST_ANSWER  # a text may begin with the same words
        if whole and start.startswith(magic) and path.suffix.lower() != ending:
            raise BadFile(f"{path} is {what}")


def open_bytes(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed if its name ends in `.gz` or `.zst`.

    Raises:
        BadFile: it is not what its name says, or Zstandard is not installed.
        OSError: the file cannot be read.
    """
    refuse_disguised(path)
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    return cast(BinaryIO, io.BufferedReader(_zstd().open(path, "rb"))) if suffix == ".zst" else path.open("rb")


def lines_of(stream: IO[AnyStr], path: Path) -> Iterator[AnyStr]:
    """The lines of a file.

    Raises:
        BadFile: a line is larger than LARGEST.
    """
    while line := stream.readline(LARGEST + 1):
        refuse_large(line, path)
        yield line


def refuse_large(record: str | bytes, path: Path) -> None:
    """Refuse a record that is larger than LARGEST."""
    if len(record) > LARGEST:
        raise BadFile(f"{path} holds a record larger than {LARGEST >> 20:,} MiB; write one record a line (.jsonl)")


def _zstd() -> Any:
    try:
        from compression import zstd  # from Python 3.14 on
    except ImportError:
        try:
            import zstandard as zstd
        except ImportError as error:
            raise BadFile(
                "a .zst file needs Python 3.14 or the zstandard package; install it with: pip install zstandard"
            ) from error
    return zstd


def damaged() -> tuple[type[Exception], ...]:
    """The exceptions with which reading a damaged compressed file ends."""
    loaded = [sys.modules[name] for name in ("compression.zstd", "zstandard") if sys.modules.get(name)]
    return (EOFError, zlib.error, *(module.ZstdError for module in loaded))
