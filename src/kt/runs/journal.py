"""A journal keeps the finished phases of a long run as files, so that an interrupted run can resume.

    FOLDER/manifest.json             marks the run as unfinished; the finished run replaces the folder
    FOLDER/settings.json             the run's settings; a resumed run must have the same
    FOLDER/phases/NAME.safetensors   the result of one finished phase

A phase is a function of the settings and of earlier phases, and its file holds the result bit by bit. So a resumed run
gives the same bytes as an uninterrupted one.

With several processes (parallel.py) rank 0 owns the folder. One process computes a phase and all get its result. Phase
names do not depend on the processes, so a run may resume with another number of them.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .._util.data import complete_file, load_arrays, plain, read_json, save_arrays, write_json
from .._util.files import clear_temporaries
from .._util.lock import FolderLock
from .._util.progress import reused
from ..errors import BadFile, KtError, warn_user
from . import parallel
from .folder import MANIFEST

T = TypeVar("T")
SPREADS = {"boundary": "ends", "forward": "rest"}
"""Values of `spread` in the runs and edits of older versions: the names that the same rules have today."""
SETTINGS, PHASES, KIND = "settings.json", "phases", "phase"
SINCE = (
    "model config",
    "model tokenizer",
    "model parts",
    "model's texts",
    "corpus identity",
    "preset file",
    "versions",
)
"""Settings that runs and sweeps of earlier versions did not note."""


class Journal:
    """Phases by name, in a folder; without a folder nothing is kept. `Journal.begin` makes one for a run."""

    def __init__(self, folder: str | Path | None = None, prefix: str = "") -> None:
        self.folder = None if folder is None else Path(folder)
        self.prefix = prefix
        self._lock: FolderLock | None = None

    @classmethod
    def begin(cls, folder: str | Path, settings: Mapping[str, Any], resume: bool, argv: Sequence[str] = ()) -> Journal:
        """A journal in `folder`: a new one or, with `resume`, the existing one.

        Raises:
            KtError: as `claim`, or another run uses the folder.
        """
        journal = cls(folder)
        parallel.on_rank_zero(f"the journal {folder}", journal._begin, settings, resume, argv)
        return journal

    def _begin(self, settings: Mapping[str, Any], resume: bool, argv: Sequence[str]) -> None:
        assert self.folder is not None
        if not claim(self.folder, settings, resume):
            try:
                write_json(self.folder / MANIFEST, {"command_line": ["kt", *argv], "unfinished": True})
                write_json(self.folder / SETTINGS, plain(dict(settings)))
            except BaseException:
                shutil.rmtree(self.folder, ignore_errors=True)
                raise
        self._lock = FolderLock(self.folder)
        if self._lock.taken:
            raise KtError(f"another process is at work on {self.folder}; wait for it, or name another folder")
        clear_temporaries(self.folder / PHASES)

    def within(self, part: str) -> Journal:
        """The journal of a part of the run: `part` prefixes the names of its phases."""
        return Journal(self.folder, f"{self.prefix}{part}-")

    def take(self, name: str, compute: Callable[..., T], *arguments: Any) -> T:
        """The result of a phase, `compute(*arguments)`: read from its file, or computed and kept.

        The result may consist of tensors, numpy arrays, numbers, text, None, and of lists, tuples and dicts of these
        (with text keys). Tensors come back on the CPU, named tuples as tuples.

        Raises:
            BadFile: the phase's file is incomplete, which no interruption can cause.
        """
        return parallel.on_rank_zero(self.prefix + name, self._take, name, compute, arguments)

    def take_each(
        self,
        name: str,
        compute: Callable[..., T],
        phases: Mapping[str, Sequence[Any]],
        progress: Callable[[int], Any] | None = None,
    ) -> list[T]:
        """The results of independent phases, `compute(*arguments)` each, in their order; see `take`.

        The phases are shared out among the processes.

        Args:
            name: a name for all phases together.
            phases: each phase's name and arguments.
            progress: called with the number of phases done.
        """

        def take(phase: tuple[str, Sequence[Any]]) -> T:
            if self.keeps(phase[0]):
                reused()
            return self._take(phase[0], compute, phase[1])

        return parallel.map_over_ranks(self.prefix + name, list(phases.items()), take, progress)

    def _take(self, name: str, compute: Callable[..., T], arguments: Sequence[Any]) -> T:
        if self.folder is None:
            return compute(*arguments)
        kept = self.checkpoint(name)
        if kept is not None:
            return kept[0]
        value = compute(*arguments)
        self.replace(name, value)
        return value

    def keeps(self, name: str) -> bool:
        """Whether a phase's result is kept."""
        return self.folder is not None and self._path(name).exists()

    def checkpoint(self, name: str) -> tuple[Any] | None:
        """The value that is kept under a phase's name, alone in a tuple; None where there is none."""
        if not self.keeps(name):
            return None
        path, remedy = self._path(name), "delete it, and it is done again"
        try:
            with complete_file(path, "phase", remedy):
                arrays, header = load_arrays(path, kind=KIND, framework="pt")
                return (_unpacked(header["value"], arrays),)
        except BadFile as error:
            raise BadFile(str(error) if remedy in str(error) else f"{error}; {remedy}") from None

    def replace(self, name: str, value: Any) -> None:
        """Keep a value under a phase's name in place of the one before: how far a loop of many steps has come."""
        if self.folder is None:
            return
        arrays: dict[str, Any] = {}
        shape = _packed(value, arrays)
        save_arrays(self._path(name), arrays, {"kind": KIND, "name": self.prefix + name, "value": shape})

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / PHASES / f"{_file_name(self.prefix + name)}.safetensors"

    def release(self) -> None:
        """Release the folder for other processes; the end of the process does the same."""
        if self._lock is not None:
            self._lock.release()

    @property
    def done(self) -> int:
        """The number of kept phases."""
        return 0 if self.folder is None else sum(1 for _ in (self.folder / PHASES).glob("*.safetensors"))


def claim(folder: Path, settings: Mapping[str, Any], resume: bool, what: str = "run") -> bool:
    """Whether `folder` holds a `what` (a run, a sweep) to resume; False if a new one may begin.

    A run of an older kt goes on where it did not note a setting of `SINCE`: the folder was named by hand, its weights
    are compared, and its parts took hours. A warning says what was not compared.

    Raises:
        KtError: `resume` without a run, or with other settings; or a run without `resume`.
    """
    exists = (folder / SETTINGS).exists()
    if resume and not exists:
        raise KtError(f"{folder} holds no {what} to go on with (no {SETTINGS}); leave --resume out")
    if exists and not resume:
        raise KtError(f"{folder} holds a {what} already; go on with --resume {folder}, or name another folder")
    if exists:
        old, new = todays_names(read_json(folder / SETTINGS)), todays_names(plain(dict(settings)))
        unnoted = [name for name in sorted(new) if name in SINCE and name not in old]
        if unnoted:
            warn_user(
                f"{folder} was begun by an older kt, which did not note its {', '.join(unnoted)}: they were not "
                f"compared; are they others, begin anew in another folder"
            )
        for name in sorted(set(new) - set(unnoted)):
            if (difference := first_difference(old.get(name), new[name])) is not None:
                key, before, now = difference
                raise KtError(
                    f"{folder} was begun with {name} {key}{_short(before)}, now it is {_short(now)}; "
                    "repeat the first settings, or begin anew in another folder"
                )
    return exists


def todays_names(value: Any) -> Any:
    """Settings of an older version with today's name of each rule in `SPREADS`, also inside a `--set`."""
    if isinstance(value, dict):
        named = {key: SPREADS.get(item, item) if key == "spread" and isinstance(item, str) else item
                 for key, item in value.items()}  # fmt: skip
        return {key: todays_names(item) for key, item in named.items()}
    if isinstance(value, list):
        return [todays_names(item) for item in value]
    if isinstance(value, str):
        return re.sub(rf"\bspread=({'|'.join(SPREADS)})\b", lambda match: f"spread={SPREADS[match[1]]}", value)
    return value


def first_difference(old: Any, new: Any) -> tuple[str, Any, Any] | None:
    """Where two settings differ: the key, where both are flat objects, and the two values; None where they do not."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = (key for key in sorted({*old, *new}) if old.get(key) != new.get(key))
        return next(((f"{key} ", old.get(key), new.get(key)) for key in keys), None)
    return None if old == new else ("", old, new)


def _short(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict) and "options" in value[0]:  # a sweep's points
        value = [f"{point.get('series', '')} {point.get('label', '')} {point['options']}" for point in value]
    text = str(value)
    return text if len(text) <= 160 else f"{text[:157]}..."


def _file_name(name: str) -> str:
    """A unique file name for a phase: its name if that is short and plain, else a part of it with a hash."""
    readable = re.sub(r"[^A-Za-z0-9.@_]+", "-", name)
    if readable == name and len(name) <= 100:
        return name
    return f"{readable[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _packed(value: Any, arrays: dict[str, Any]) -> Any:
    """The value as JSON, with its tensors and arrays moved to `arrays`."""
    if value is None or isinstance(value, bool | int | str):
        return {"plain": value}
    if isinstance(value, float):
        return {"float": value.hex()}  # JSON has no infinities, and no NaN
    if isinstance(value, Mapping):
        return {"dict": {str(key): _packed(item, arrays) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        return {"tuple" if isinstance(value, tuple) else "list": [_packed(item, arrays) for item in value]}
    name = str(len(arrays))
    if hasattr(value, "detach"):
        arrays[name] = value
        return {"tensor": name}
    if hasattr(value, "__array__"):
        import torch

        arrays[name] = torch.as_tensor(value)
        return {"numpy": name}
    raise TypeError(f"a phase's result holds a {type(value).__name__}, which no file can hold")


def _unpacked(packed: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
    ((kind, value),) = packed.items()
    if kind == "plain":
        return value
    if kind == "float":
        return float.fromhex(value)
    if kind == "dict":
        return {key: _unpacked(item, arrays) for key, item in value.items()}
    if kind in ("list", "tuple"):
        items = [_unpacked(item, arrays) for item in value]
        return tuple(items) if kind == "tuple" else items
    return arrays[value].numpy() if kind == "numpy" else arrays[value]
