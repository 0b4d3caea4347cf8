"""A journal: the finished phases of a long run as files, so that a run that is cut off goes on from there.

    FOLDER/manifest.json             says that the run is unfinished; the finished one takes the folder's place
    FOLDER/settings.json             what was asked; a run that goes on must be asked the same
    FOLDER/phases/NAME.safetensors   what one finished phase gave

A phase is a function of what was asked and of the phases before it, and a file holds its result to the bit: a run that
goes on gives the bytes that it would have given uninterrupted.

Of several processes (ranks.py) rank 0 has the folder. A phase is one process's work and all get its result; its name
is that of the work, so a run may go on with any number of processes.
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
from ..errors import BadFile, KtError
from . import parallel as ranks
from .folder import MANIFEST

T = TypeVar("T")
SETTINGS, PHASES, KIND = "settings.json", "phases", "phase"


class Journal:
    """Phases by name, in a folder or (without one) nowhere. `Journal.begin` makes one for a run."""

    def __init__(self, folder: str | Path | None = None, prefix: str = "") -> None:
        self.folder = None if folder is None else Path(folder)
        self.prefix = prefix
        self._hold: FolderLock | None = None

    @classmethod
    def begin(cls, folder: str | Path, settings: Mapping[str, Any], resume: bool, argv: Sequence[str] = ()) -> Journal:
        """A journal in `folder`, new or (with `resume`) the one that stands there.

        Raises:
            KtError: what `claim` raises, or another process has the folder.
        """
        journal = cls(folder)
        ranks.on_rank_zero(f"the journal {folder}", journal._begin, settings, resume, argv)
        return journal

    def _begin(self, settings: Mapping[str, Any], resume: bool, argv: Sequence[str]) -> None:
        assert self.folder is not None
        there = claim(self.folder, settings, resume)
        if not there:
            try:
                write_json(self.folder / MANIFEST, {"command_line": ["kt", *argv], "unfinished": True})
                write_json(self.folder / SETTINGS, plain(dict(settings)))
            except BaseException:
                shutil.rmtree(self.folder, ignore_errors=True)
                raise
        self._hold = FolderLock(self.folder)
        if self._hold.taken:
            raise KtError(f"another process is at work on {self.folder}; wait for it, or name another folder")
        clear_temporaries(self.folder / PHASES)

    def within(self, part: str) -> Journal:
        """The journal of a part of the run: its phases have names of their own."""
        return Journal(self.folder, f"{self.prefix}{part}-")

    def take(self, name: str, compute: Callable[..., T], *arguments: Any) -> T:
        """The result of a phase, `compute(*arguments)`: from its file, or computed and kept.

        It may be made of tensors, numpy arrays, numbers, text, None, and of lists, tuples and dicts of these (keys are
        text). Tensors come back on the CPU, named tuples as tuples.

        Raises:
            BadFile: the phase's file is not whole, which no interruption can cause.
        """
        return ranks.on_rank_zero(self.prefix + name, self._take, name, compute, arguments)

    def take_each(
        self,
        name: str,
        compute: Callable[..., T],
        phases: Mapping[str, Sequence[Any]],
        progress: Callable[[int], Any] | None = None,
    ) -> list[T]:
        """The results of phases that do not need each other, `compute(*arguments)` by name, in their order.

        They are shared out among the processes, where there are several. `name` is that of all together, and
        `progress` is called with how many are done. Results are as `take` gives them.
        """

        def one(phase: tuple[str, Sequence[Any]]) -> T:
            return self._take(phase[0], compute, phase[1])

        return ranks.map_over_ranks(self.prefix + name, list(phases.items()), one, progress)

    def _take(self, name: str, compute: Callable[..., T], arguments: Sequence[Any]) -> T:
        if self.folder is None:
            return compute(*arguments)
        path = self.folder / PHASES / f"{_file_name(self.prefix + name)}.safetensors"
        if path.exists():
            again = "delete it, and it is done again"
            try:
                with complete_file(path, "phase", again):
                    arrays, held = load_arrays(path, kind=KIND, framework="pt")
                    return _unpacked(held["value"], arrays)
            except BadFile as error:
                raise BadFile(str(error) if again in str(error) else f"{error}; {again}") from None
        value = compute(*arguments)
        arrays = {}
        shape = _packed(value, arrays)
        save_arrays(path, arrays, {"kind": KIND, "name": self.prefix + name, "value": shape})
        return value

    def release(self) -> None:
        """Let others go on with the run; the end of the process does the same."""
        if self._hold is not None:
            self._hold.release()

    @property
    def done(self) -> int:
        """How many phases are kept."""
        return 0 if self.folder is None else sum(1 for _ in (self.folder / PHASES).glob("*.safetensors"))


def claim(folder: Path, settings: Mapping[str, Any], resume: bool, what: str = "run") -> bool:
    """Whether `folder` holds something (a run, a sweep) that is to go on; False where a new one may begin.

    Raises:
        KtError: `resume`, and there is none or it was asked something else; or no `resume`, and there is one.
    """
    there = (folder / SETTINGS).exists()
    if resume and not there:
        raise KtError(f"{folder} holds no {what} to go on with (no {SETTINGS}); leave --resume out")
    if there and not resume:
        raise KtError(f"{folder} holds a {what} already; go on with --resume {folder}, or name another folder")
    if there:
        _refuse_other(folder, read_json(folder / SETTINGS), plain(dict(settings)))
    return there


def _refuse_other(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for name in sorted(new):
        if old.get(name) != new[name]:
            was, now = (_short(held.get(name)) for held in (old, new))
            raise KtError(
                f"{folder} was begun with {name} {was}, now it is {now}; repeat the first settings, or begin anew "
                "in another folder"
            )


def _short(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict) and "options" in value[0]:  # a sweep's points
        value = [f"{each.get('series', '')} {each.get('label', '')} {each['options']}" for each in value]
    text = str(value)
    return text if len(text) <= 160 else f"{text[:157]}..."


def _file_name(name: str) -> str:
    """A name that can be read where it is short and plain, and is never another's."""
    readable = re.sub(r"[^A-Za-z0-9.@_]+", "-", name)
    if readable == name and len(name) <= 100:
        return name
    return f"{readable[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _packed(value: Any, arrays: dict[str, Any]) -> Any:
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


def _unpacked(held: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
    ((kind, value),) = held.items()
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
