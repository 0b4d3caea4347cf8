"""Two edits side by side: differing settings, requests, and the distance of their updates."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import BadFile
from ..model.update import LowRank, Update
from ..report import Shown, Table
from ..report.table import setting, shown
from .conflicts import same_fact
from .edit import Edit
from .file_kind import KINDS, STACK, header_kind
from .stack import EditStack, facts_of

COMPARED = (
    "method", "alpha", "alphas", "model", "revision", "dtype", "seed", "norm_guard", "past_keys", "steps", "aims",
    "context_templates", "stands_on", "stack", "editor",
)  # fmt: skip
"""`editor` is a trained editor's digest: its file alone has one name for every training."""
NESTED = ("hyper_parameters", "statistics", "versions")
DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")


class WeightDiff(NamedTuple):
    """A weight's two updates: their Frobenius norms, the cosine between them, and ‖A - B‖ / ‖A‖. None where one of the
    edits does not write it."""

    name: str
    norms: tuple[float | None, float | None]
    cosine: float | None
    difference: float | None


class EntryDiff(NamedTuple):
    """An entry of an effect (a text, or a key with its radius), and which of the edits has it: A, B or both."""

    entry: str
    among: str


class RequestDiff(NamedTuple):
    """A fact that an edit was asked for: its target in each, None where an edit was not asked for it."""

    prompt: str
    targets: tuple[str | None, str | None]


@dataclass(frozen=True)
class EditDiff(Shown):
    """Differences of two edits. `same_base`: the weights that both write were the same when they were solved."""

    settings: dict[str, tuple[Any, Any]]
    requests: tuple[RequestDiff, ...]
    weights: tuple[WeightDiff, ...]
    same_base: bool
    entries: tuple[EntryDiff, ...] = ()

    kind = "edit difference"

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The settings that differ."""
        return self.settings

    @property
    def conflicts(self) -> tuple[RequestDiff, ...]:
        """Facts that the two give different targets."""
        return tuple(r for r in self.requests if None not in r.targets and r.targets[0] != r.targets[1])

    def only(self, side: int) -> tuple[RequestDiff, ...]:
        """Facts that only the first edit (0) or the second (1) was asked for."""
        return tuple(r for r in self.requests if r.targets[1 - side] is None)

    @property
    def both(self) -> tuple[RequestDiff, ...]:
        """Facts with one target in both."""
        return tuple(r for r in self.requests if r.targets[0] == r.targets[1])

    def tables(self) -> Sequence[Table]:
        """Settings, requests, weights; A is the first edit."""
        settings = [[shown(name), *map(_short, pair)] for name, pair in self.settings.items()]
        words = {"only A": self.only(0), "only B": self.only(1), "other target": self.conflicts, "both": self.both}
        requests = [[word, shown(r.prompt), *map(shown, r.targets)] for word, some in words.items() for r in some]
        counts = ", ".join(f"{word} {len(some)}" for word, some in words.items())
        weights = [[shown(w.name), *w.norms, w.cosine, w.difference] for w in self.weights]
        entries = [[each.among, each.entry] for each in self.entries]
        return [
            Table(["name", "A", "B"], settings, "settings that differ"),
            Table(["in", "prompt", "A's target", "B's target"], requests, "requests", counts),
            Table(["weight", "|A|", "|B|", "cosine", "|A - B| / |A|"], weights, "weights"),
            *([Table(["in", "entry"], entries, "entries of edits that leave the weights alone")] if entries else []),
        ]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        names = {
            "only_first": self.only(0),
            "only_second": self.only(1),
            "both": self.both,
            "conflicts": self.conflicts,
        }
        return {
            "settings": {name: list(pair) for name, pair in self.settings.items()},
            "requests": {name: [r._asdict() for r in requests] for name, requests in names.items()},
            "weights": [weight._asdict() for weight in self.weights],
            "same_base": self.same_base,
            "entries": [entry._asdict() for entry in self.entries],
        }


def diff(first: Edit, second: Edit) -> EditDiff:
    """Compare two edits; no model is needed."""
    fingerprints = [edit.manifest.get("fingerprints", {}) for edit in (first, second)]
    shared = set(first.names) & set(second.names)
    same = all(fingerprints[0].get(name) == fingerprints[1].get(name) for name in shared)
    noted = [edit.manifest["identity"] for edit in (first, second) if "identity" in edit.manifest]
    same = same and all(identity == noted[0] for identity in noted)
    made_on = {(e.effect.place, e.effect.fields()["fingerprint"]) for e in (first, second) if e.effect is not None}
    same = same and len(made_on) == len({place for place, _ in made_on})
    names = dict.fromkeys((*first.names, *second.names))
    weights = tuple(_weight(name, first.updates.get(name), second.updates.get(name)) for name in names)
    return EditDiff(_settings(first, second), _requests(first, second), weights, same, _entries(first, second))


def _entries(first: Edit, second: Edit) -> tuple[EntryDiff, ...]:
    """The lines of both effects' tables, each once."""
    lines = []
    for edit in (first, second):
        table = None if edit.effect is None else edit.effect.table()
        heads, rows = (table.headers, table.texts()) if table else ([], [])
        lines.append(["; ".join(f"{head} {text}" for head, text in zip(heads, row, strict=True)) for row in rows])
    among = {(True, True): "both", (True, False): "A", (False, True): "B"}
    return tuple(EntryDiff(e, among[e in lines[0], e in lines[1]]) for e in dict.fromkeys([*lines[0], *lines[1]]))


def _settings(first: Edit, second: Edit) -> dict[str, tuple[Any, Any]]:
    """Every setting by name whose values differ; those inside a group as `group.name`."""
    flat = []
    for edit in (first, second):
        values = {name: edit.manifest.get(name) for name in COMPARED}
        for group in NESTED:
            values |= {f"{group}.{name}": value for name, value in (edit.manifest.get(group) or {}).items()}
        flat.append({name: list(v) if isinstance(v, tuple) else v for name, v in values.items()})
    names = dict.fromkeys((*flat[0], *flat[1]))
    pairs = {name: (flat[0].get(name), flat[1].get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _short(value: Any) -> Any:
    """A setting as a cell, digests by the 12 digits that other tables show; `as_dict` keeps all."""
    cut = lambda text: DIGEST.sub(r"\1", str(text))  # noqa: E731
    if isinstance(value, Mapping):
        value = {name: cut(item) for name, item in value.items()}
    elif isinstance(value, list | tuple):
        value = [cut(item) for item in value]
    return setting(cut(value) if isinstance(value, str) else value)


def _requests(first: Edit, second: Edit) -> tuple[RequestDiff, ...]:
    unmatched = dict(enumerate(facts_of([second])))
    pairs = []
    for fact in facts_of([first]):
        match = next((i for i, other in unmatched.items() if same_fact(fact, other)), None)
        # One target in other capitals or with a full stop is the same target.
        other = None if match is None else unmatched.pop(match)
        target = None if other is None else fact.target if same_fact(fact, other) == "same" else other.target
        pairs.append(RequestDiff(fact.prompt, (fact.target, target)))
    return (*pairs, *(RequestDiff(other.prompt, (None, other.target)) for other in unmatched.values()))


def _weight(name: str, first: Update | None, second: Update | None) -> WeightDiff:
    norms = (None if first is None else first.norm(), None if second is None else second.norm())
    if first is None or second is None or first.shape != second.shape:
        return WeightDiff(name, norms, None, None)
    along, (a, b) = inner(first, second), (first.norm(), second.norm())
    apart = max(a * a + b * b - 2 * along, 0.0) ** 0.5
    return WeightDiff(name, norms, along / (a * b) if a * b else None, apart / a if a else None)


def inner(first: Update, second: Update) -> float:
    """The Frobenius inner product, from the factors' small Gram matrices where both are low-rank."""
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        left, right = first.left.double().T @ second.left.double(), first.right.double() @ second.right.double().T
        return float((left * right).sum())
    one, two = (update.to(torch.float64).dense() for update in (first, second))
    return float((one * two).sum())


# Which edits and stacks lie in a folder, broken ones with the reason.

LARGEST_STACK = 1_000_000


@dataclass(frozen=True)
class Stored:
    """A file of an edit or a stack. `error`: why it cannot be opened; then no other field is known.

    `size` is in bytes (of a stack, with its edits' files), `modified` in UTC to the second.
    """

    path: Path
    kind: str
    size: int
    modified: str
    method: str | None = None
    requests: int | None = None
    alpha: float | None = None
    weights: int | None = None
    model: str | None = None
    digest: str | None = None
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return vars(self) | {"path": str(self.path)}


def stored(places: Sequence[str | Path] = (".",)) -> list[Stored]:
    """Every edit file and stack in these folders and below, and among these files, in the order of their paths.

    Other programs' files, and kt's own of other kinds, are passed over; hidden ones too.

    Raises:
        BadFile: a place that is not there.
    """
    by_path: dict[Path, Stored] = {}
    for root in map(Path, places):
        if not root.exists():
            raise BadFile(f"{root}: no such file or folder; name one that holds edits")
        for path in sorted(_files(root)):
            kind = _kind(path)
            if kind is not None and path not in by_path:
                by_path[path] = _read(path, kind)
    return list(by_path.values())


def _files(root: Path) -> Iterator[Path]:
    if root.is_file():
        yield root
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if name.endswith((".safetensors", ".json")) and not name.startswith(".") and path.is_file():
                yield path


def _kind(path: Path) -> str | None:
    """`edit` or `stack`; `edit` also for a safetensors file whose header cannot be read."""
    try:
        if path.suffix == ".json":
            small = path.stat().st_size <= LARGEST_STACK
            return "stack" if small and f'"{STACK}"'.encode() in path.read_bytes() else None
        return "edit" if header_kind(path) in KINDS else None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, BadFile):
        return "edit"


def _read(path: Path, kind: str) -> Stored:
    about = path.stat()
    modified = datetime.fromtimestamp(about.st_mtime, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    try:
        edit: Edit | EditStack = EditStack.load(path) if kind == "stack" else Edit.load(path)
        if isinstance(edit, Edit) and edit.effect is not None:
            kind = edit.effect.kind
    except BadFile as error:
        return Stored(path, kind, about.st_size, modified, error=str(error).removeprefix(f"{path}: "))
    files = [e.file for e in edit.layers if e.file] if isinstance(edit, EditStack) else []
    return Stored(
        path,
        kind,
        about.st_size + sum(file.stat().st_size for file in files),
        modified,
        edit.manifest.get("method"),
        len(edit.requests),
        edit.alpha,
        len(edit.names),
        edit.manifest.get("model"),
        edit.digest if isinstance(edit, Edit) else None,
    )
