"""The items of a JSON list, one at a time, from a file of any size; and a file's only value.

The standard library's decoder parses each item from a growing window on the file, so values, error messages and their
lines and columns are those of `json.loads`.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import BadFile
from .opening import open_bytes, refuse_large

CHUNK = 1 << 18
"""Bytes read at a time; for a larger item the window grows to its size."""

MARGIN = 12
"""Characters before the window's end in which an error may only be a cut: more than the longest literal or escape."""

WHITESPACE = " \t\n\r"
TOO_MUCH = "JSON with a number too long or brackets too deep to read; mend the record or leave it out"
HINT = "; one record per line needs the ending .jsonl"
MEND = "; mend it there, or fetch the file again"
DECODER = json.JSONDecoder()


class Window:
    """The part of a UTF-8 file that is read and not yet parsed.

    Attributes:
        text, at: the window, and the index of its first character that is not yet parsed.
        ended: whether the file is read to its end.
        n_bytes: bytes read.
        line, column: of the window's first character in the file, from 1.
    """

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self.stream, self.path = stream, path
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.ended = "", 0, False
        self.n_bytes, self.line, self.column = 0, 1, 1

    def grow(self) -> None:
        """Drop the parsed part and at least double the rest, so that an item is parsed again only log n times."""
        self._drop_parsed()
        refuse_large(self.text, self.path)
        raw = self.stream.read(max(CHUNK, len(self.text)))
        self.ended = not raw
        if b"\0" in raw:
            raise BadFile(f"{self.path}: holds NUL bytes, so it is no text; give UTF-8 JSON")
        try:
            self.text += self.decoder.decode(raw, final=self.ended)
        except UnicodeDecodeError as error:
            pending = len(error.object) - len(raw)
            byte = self.n_bytes - pending + error.start
            raise BadFile(f"{self.path}: not UTF-8 at byte {byte}; save the file as UTF-8") from error
        self.n_bytes += len(raw)

    def peek(self) -> str:
        """The next character that is not whitespace, or "" at the file's end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in WHITESPACE:
                self.at += 1
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.grow()

    def error(self, reason: str, at: int | None = None) -> BadFile:
        """The error for a character of the window (by default the next one), with its line and column."""
        self.at = self.at if at is None else at
        self._drop_parsed()
        return BadFile(
            f"{self.path}: not JSON at line {self.line}, column {self.column}: {reason}{'' if ';' in reason else MEND}"
        )

    def value(self) -> Any:
        """The next JSON value."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - MARGIN
                if self.ended or not cut:
                    raise self.error(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:
                raise BadFile(f"{self.path}: {TOO_MUCH}") from error
            else:
                if end + MARGIN < len(self.text) or self.ended:  # a number at the end may go on: 1, 1.5e-3
                    self.at = end
                    return value
            self.grow()

    def end(self) -> None:
        """Refuse text behind the value that was read last."""
        if self.peek():
            raise self.error(f"Extra data{HINT}")

    def _drop_parsed(self) -> None:
        parsed = self.text[: self.at]
        lines = parsed.count("\n")
        self.line += lines
        self.column = len(parsed) - parsed.rfind("\n") if lines else self.column + len(parsed)
        self.text, self.at = self.text[self.at :], 0


def is_list(path: Path) -> bool:
    """Whether the file's first character, whitespace aside, opens a list.

    Raises:
        BadFile: it does not begin with UTF-8 text.
        OSError: the file cannot be read.
    """
    with open_bytes(path) as stream:
        return Window(stream, path).peek() == "["


def lone_value(path: Path) -> Any:
    """The only value of a file.

    Raises:
        BadFile: as `items`, or the file is blank.
        OSError: the file cannot be read.
    """
    with open_bytes(path) as stream:
        window = Window(stream, path)
        if not window.peek():
            raise BadFile(f"{path} is empty; give a JSON list of records")
        value = window.value()
        window.end()
        return value


def items(path: Path) -> Iterator[Any]:
    """The items of the list in a file, of which `is_list` is true.

    Memory: one chunk or one item, whichever is larger.

    Raises:
        BadFile: not UTF-8, not JSON (with line and column), text behind the list, or an item larger than LARGEST.
        OSError: the file cannot be read.
    """
    with open_bytes(path) as stream:
        window = Window(stream, path)
        window.peek()
        window.at += 1
        if window.peek() != "]":
            while True:
                window.peek()
                yield window.value()
                if window.peek() != ",":
                    break
                window.at += 1
        if window.peek() != "]":
            raise window.error("Expecting ',' delimiter")
        window.at += 1
        window.end()
