"""What lies in the cache: second moments, their factors, scores, layers and α, checkpoints, leftovers of killed runs.

Only files that kt names so are listed or removed. Lock files (empty) stay: another process may hold one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .._util.data import read_json, read_metadata
from .._util.files import writing
from ..errors import BadFile, KtError

KINDS = {
    r"cov-[0-9a-f]{40}-\d+\.safetensors": "second moment",
    r"cov-[0-9a-f]{40}\.safetensors": "second moment of an older kt",
    r"factor-[0-9a-f]{40}\.safetensors": "factor",
    r"eigen-[0-9a-f]{40}\.safetensors": "eigenvectors",
    r"scores-[0-9a-f]{40}\.json": "scores",
    r"partial-[0-9a-f]{40}\.safetensors": "checkpoint",
    r"\.tmp\w+|\.(cov|factor|eigen|scores|partial)-.*\.tmp-[0-9a-f]+": "temporary",
}
"""File name -> what it is."""
LAYERS = {r"balance\.json": "balance", r"[\w-]+\.toml": "layers"}
"""The same in `layers/IDENTITY/`: α and layers of a model (`editing.evidence`)."""

ABANDONED = 3600
"""Seconds after which nobody writes to a temporary file any more."""


@dataclass(frozen=True)
class Entry:
    """A file in the cache.

    Attributes:
        weight: whose second moment it is or comes from; "" where the file does not say.
        n_tokens: of the corpus, that were read.
        size, age: in bytes, and seconds since it was written.
        origin: the name of the second moment that a factor comes from.
    """

    path: Path
    kind: str
    model: str
    weight: str
    corpus: str
    n_tokens: int | None
    size: int
    age: float
    origin: str

    @property
    def name(self) -> str:
        return str(Path(*self.path.parts[-3:])) if self.path.parts[-3] == "layers" else self.path.name

    @property
    def short(self) -> str:
        """The name without its ending, hashes cut to ten digits: what a person reads and types."""
        name = self.name.removesuffix(".safetensors").removesuffix(".json")
        return re.sub(r"([0-9a-f]{10})[0-9a-f]{30}", r"\1", name)

    @property
    def stray(self) -> bool:
        """Whether a killed run left it behind."""
        return self.kind == "temporary" and self.age > ABANDONED

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"path": str(self.path), "name": self.name}


def entries(folder: Path) -> list[Entry]:
    """The cache's files, largest first; none where there is no such folder."""
    found = []
    kept = [(path, KINDS) for path in folder.glob("*")] + [(path, LAYERS) for path in folder.glob("layers/*/*")]
    for path, kinds in kept:
        kind = next((kind for pattern, kind in kinds.items() if re.fullmatch(pattern, path.name)), None)
        if kind is not None and path.is_file() and not path.is_symlink():
            found.append(_entry(path, kind))
    of = {entry.path.stem: entry for entry in found}
    return sorted((_with_origin(entry, of) for entry in found), key=lambda entry: (-entry.size, entry.name))


def _entry(path: Path, kind: str) -> Entry:
    about, weight = {}, ""
    try:
        if path.suffix == ".json":
            about = {"model": read_json(path).get("model")}
        elif path.suffix == ".safetensors":
            about, weight = _header(path)
    except (KtError, OSError, ValueError):
        kind = f"{kind}, damaged"
    stat = path.stat()
    tokens = about.get("n_tokens")
    return Entry(
        path,
        kind,
        str(about.get("model") or ""),
        weight,
        str(about.get("corpus") or ""),
        tokens if isinstance(tokens, int) else None,
        stat.st_size,
        max(0.0, time.time() - stat.st_mtime),
        str(about.get("of") or ""),
    )


def _header(path: Path) -> tuple[dict[str, Any], str]:
    """kt's metadata, and the weight where there is one tensor."""
    names, about = read_metadata(path)
    return about, names[0] if path.name.startswith("cov-") and names else ""


def _with_origin(entry: Entry, of: dict[str, Entry]) -> Entry:
    """A factor with what its second moment's file says."""
    source = of.get(entry.origin)
    if source is None:
        return entry
    return replace(entry, model=source.model, weight=source.weight, corpus=source.corpus, n_tokens=source.n_tokens)


def chosen(
    found: Sequence[Entry],
    names: Sequence[str] = (),
    model: str | None = None,
    older_than: float | None = None,
    everything: bool = False,
) -> list[Entry]:
    """The entries that are named, or that fit all other conditions; with their factors, and what killed runs left.

    Args:
        names: file names, whole or short, or beginnings that one file alone has.
        older_than: seconds.

    Raises:
        BadFile: a name that no file or several have, or a model of which there is nothing.
    """
    taken = {name for wanted in names for name in _named(found, wanted)}
    if model is not None and model not in {entry.model for entry in found}:
        have = ", ".join(sorted({entry.model for entry in found} - {""})) or "none"
        raise BadFile(f"nothing in the cache is of the model {model!r}; there are: {have}")
    if everything or model is not None or older_than is not None:
        fit = (e for e in found if model in (None, e.model) and (older_than is None or e.age > older_than))
        taken |= {entry.name for entry in fit if entry.kind != "temporary"}
    stems = {name.removesuffix(".safetensors") for name in taken}
    return [entry for entry in found if entry.name in taken or entry.origin in stems or entry.stray]


def _named(found: Sequence[Entry], wanted: str) -> list[str]:
    names = [entry.name for entry in found if wanted in (entry.name, entry.short)] or [
        entry.name for entry in found if entry.name.startswith(wanted)
    ]
    if len(names) != 1:
        count = f"{len(names)} files begin" if names else "no file begins"
        raise BadFile(f"{count} with {wanted!r} in the cache; kt cache ls shows their names")
    return names


def remove(found: Sequence[Entry]) -> int:
    """Delete the files; how many bytes that gives back."""
    for entry in found:
        with writing(entry.path):
            entry.path.unlink(missing_ok=True)
    return sum(entry.size for entry in found)
