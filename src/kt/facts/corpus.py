"""Text to take statistics over: the embedded corpus, a text or JSONL file, or a Hugging Face data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import BadFile, install_hint

DEMO = Path(__file__).parents[1] / "demo" / "corpus.txt"


@dataclass(frozen=True)
class Corpus:
    """One document per line (`.txt`), per record with a `text` (`.jsonl`), or per row of `hf:repo[/config][:split]`."""

    name: str
    path: Path | None = None

    @classmethod
    def open(cls, source: str | Path) -> Corpus:
        text = str(source)
        if text == "demo":
            return cls("demo", DEMO)
        if text.startswith("hf:"):
            return cls(text)
        path = Path(text)
        if not path.is_file():
            raise BadFile(f"no corpus {text!r}; give demo, a .txt or .jsonl file, or hf:repo")
        return cls(path.name, path)

    def texts(self) -> Iterator[str]:
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
        """Hash of the file's bytes; of the name, for a data set on the hub."""
        digest = hashlib.sha256()
        if self.path is None:
            digest.update(self.name.encode())
            return digest.hexdigest()
        with self.path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()


def _record(line: str, path: Path, number: int) -> str:
    try:
        return str(json.loads(line)["text"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadFile(
            f"{path} line {number}: not a JSON object with a 'text'; write one such object per line"
        ) from None


def _hub_rows(name: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise BadFile(f"{name} needs the package datasets; install it with: {install_hint('data')}") from None
    repo, _, split = name.removeprefix("hf:").partition(":")
    parts = repo.split("/", 2)  # owner/name, and the name of one of its configurations
    try:
        return load_dataset("/".join(parts[:2]), *parts[2:], split=split or "train", streaming=True)
    except Exception as error:  # the hub, the network and every file format raise their own kinds
        raise BadFile(f"cannot open {name}: {' '.join(str(error).split())[:200]}") from None
