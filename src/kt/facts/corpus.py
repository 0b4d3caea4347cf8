"""Text for statistics and perplexity: what ships with kt, a text or JSONL file, or a Hugging Face data set.

`demo` is what the demo model was trained on; `english` is real prose of several kinds (texts/ENGLISH-SOURCES.md), the
default for every other model. Each has a held-out text beside it, from other works.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .._util.files import sha256_file
from .._util.online import ELSEWHERE, refuse_unreachable, told_offline
from ..errors import BadFile, need, said_by
from .opening import refuse_disguised

_DEMO, _ENGLISH = Path(__file__).parents[1] / "demo", Path(__file__).parent / "texts"
SHIPPED = {"demo": _DEMO / "corpus.txt", "english": _ENGLISH / "english.txt"}
_HELDOUT = {"demo": _DEMO / "heldout.txt", "english": _ENGLISH / "english-heldout.txt"}


def corpus_for(source: str, model: str) -> str:
    """The source, or for `auto` the shipped corpus that is the model's kind of text: demo or english."""
    return source if source != "auto" else "demo" if model == "demo" else "english"


TOKENS = 100_000
"""Tokens of a corpus that are counted where no number was given; of ours in English see `default_tokens`."""


def tokens_for(corpus: str, max_tokens: int | None) -> int | None:
    """The number that was given, TOKENS, or None where it follows from the model's keys; `corpus` as `corpus_for`."""
    return TOKENS if max_tokens is None and corpus != "english" else max_tokens


@dataclass(frozen=True)
class Corpus:
    """One document per line (`.txt`), per record with a `text` (`.jsonl`), or per row of `hf:repo[/config][:split]`."""

    name: str
    path: Path | None = None

    @classmethod
    def open(cls, source: str | Path, model: str = "") -> Corpus:
        """The corpus of a source: `auto`, `demo`, `english`, a path, or `hf:repo[/config][:split]`.

        Args:
            model: the name of the model that `auto` is for.

        Raises:
            BadFile: the file does not exist.
        """
        text = corpus_for(str(source), model)
        if text in SHIPPED:
            return cls(text, SHIPPED[text])
        if text.startswith("hf:"):
            return cls(text)
        path = Path(text)
        if not path.is_file():
            raise BadFile(f"no corpus {text!r}; give demo, english, a .txt or .jsonl file, or hf:repo")
        return cls(path.name, path)

    @classmethod
    def heldout(cls, model: str) -> Corpus:
        """The shipped text that is neither in a corpus of ours nor in the works that it is from."""
        name = corpus_for("auto", model)
        return cls(f"{name}/heldout.txt", _HELDOUT[name])

    def check(self) -> None:
        """Read the first document of a file.

        Raises:
            BadFile: there is none, or the file is something else than its name says.
        """
        if self.path is not None:
            refuse_disguised(self.path)
            with self.path.open("rb") as file:
                if b"\0" in file.read(64):
                    raise BadFile(f"{self.path} is no text; give a file with a document a line")
            if next(self.texts(), None) is None:
                raise BadFile(f"{self.path} holds no text; give a file with a document a line")

    def texts(self) -> Iterator[str]:
        """Yield the documents, without blank lines.

        Raises:
            BadFile: the file is not UTF-8, or a line is not a record with a `text`.
        """
        if self.path is None:
            yield from (str(row["text"]) for row in _hub_rows(self.name))
            return
        with self.path.open(encoding="utf-8") as file:
            try:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield (_record(line, self.path, number) if self.path.suffix == ".jsonl" else line.strip())
            except UnicodeDecodeError:
                raise BadFile(f"{self.path} is not UTF-8 text; convert it first") from None

    @cached_property
    def sha256(self) -> str:
        """Hash of the file's bytes, or of the name of a data set on the Hub."""
        return hashlib.sha256(self.name.encode()).hexdigest() if self.path is None else sha256_file(self.path)

    @property
    def identity(self) -> str:
        """The hash, and how the bytes are read: as lines of text or of JSON."""
        return self.sha256 + (" jsonl" if self.path is not None and self.path.suffix == ".jsonl" else "")


def _record(line: str, path: Path, number: int) -> str:
    try:
        return str(json.loads(line)["text"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadFile(
            f"{path} line {number}: not a JSON object with a 'text'; write one such object per line"
        ) from None


def _hub_rows(name: str) -> Any:
    need("datasets", name, kind=BadFile)
    from datasets import load_dataset

    refuse_unreachable(name)
    repo, _, split = name.removeprefix("hf:").partition(":")
    parts = repo.split("/", 2)  # owner/name, and the name of one of its configurations
    try:
        return load_dataset("/".join(parts[:2]), *parts[2:], split=split or "train", streaming=True)
    except Exception as error:  # the Hub, the network and the file formats raise errors of many types
        remedy = f"; {ELSEWHERE}" if told_offline() else ""
        raise BadFile(f"cannot open {name}: {said_by(error, 200)}{remedy}") from None
