"""The items of a JSON list, one by one, from a file of any size."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import BadFile

CHUNK = 1 << 18
"""Bytes read at a time; a larger item makes the buffer grow to its size."""

NEARLY = 12
"""Characters from the end of the buffer where an error may be only a cut: more than the longest literal or escape."""

BLANK = " \t\n\r"
TOO_MUCH = "JSON with a number too long or brackets too deep to read; mend the record or leave it out"
HINT = "; one record per line needs the ending .jsonl"


class Text:
    """A growing window on a UTF-8 file: what is not yet taken, and where it stands."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self.stream, self.path = stream, path
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.window, self.at, self.ended = "", 0, False
        self.taken_bytes, self.line, self.column = 0, 1, 1

    def grow(self) -> None:
        """Drop what is taken and read at least as much as is left, so that an item is parsed again only log n times."""
        self._move()
        raw = self.stream.read(max(CHUNK, len(self.window)))
        self.ended = not raw
        if b"\0" in raw:
            raise BadFile(f"{self.path}: holds NUL bytes, so it is no text; give UTF-8 JSON")
        try:
            self.window += self.decoder.decode(raw, final=self.ended)
        except UnicodeDecodeError as error:
            pending = len(error.object) - len(raw)
            byte = self.taken_bytes - pending + error.start
            raise BadFile(f"{self.path}: not UTF-8 at byte {byte}; save the file as UTF-8") from error
        self.taken_bytes += len(raw)

    def peek(self) -> str:
        """The next character that is not blank, or "" at the end."""
        while True:
            while self.at < len(self.window) and self.window[self.at] in BLANK:
                self.at += 1
            if self.at < len(self.window) or self.ended:
                return self.window[self.at : self.at + 1]
            self.grow()

    def bad(self, why: str, at: int | None = None) -> BadFile:
        """The error for a character of the window (by default the next one)."""
        self.at = self.at if at is None else at
        self._move()
        return BadFile(f"{self.path}: not JSON at line {self.line}, column {self.column}: {why}")

    def value(self) -> Any:
        """The next JSON value."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.window, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self.window) - NEARLY
                if self.ended or not cut:
                    raise self.bad(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:
                raise BadFile(f"{self.path}: {TOO_MUCH}") from error
            else:
                if end + NEARLY < len(self.window) or self.ended:  # a number at the end may go on: 1, 1.5e-3
                    self.at = end
                    return value
            self.grow()

    def _move(self) -> None:
        taken = self.window[: self.at]
        lines = taken.count("\n")
        self.line += lines
        self.column = len(taken) - taken.rfind("\n") if lines else self.column + len(taken)
        self.window, self.at = self.window[self.at :], 0


DECODER = json.JSONDecoder()


def is_list(path: Path) -> bool:
    """Whether the file's first character opens a list."""
    with path.open("rb") as stream:
        return Text(stream, path).peek() == "["


def items(path: Path) -> Iterator[Any]:
    """The items of the list that the file holds.

    Memory: one chunk or one item, whichever is larger.

    Raises:
        BadFile: not UTF-8, not JSON (with line and column), or something behind the list.
    """
    with path.open("rb") as stream:
        text = Text(stream, path)
        text.peek()
        text.at += 1
        if text.peek() != "]":
            while True:
                text.peek()
                yield text.value()
                if text.peek() != ",":
                    break
                text.at += 1
        if text.peek() != "]":
            raise text.bad("Expecting ',' delimiter")
        text.at += 1
        if text.peek():
            raise text.bad(f"Extra data{HINT}")
