"""A run folder: settings (`manifest.json`), results (`results.json`, `arrays.safetensors`) and figures.

It is filled under a temporary name beside the final one and renamed when complete. A run of that name is an error, or
with `overwrite` moves aside then; anything else of that name is an error.

With several processes (parallel.py) rank 0 fills the folder. The others run the same program and write too, into
temporary folders that are deleted at the end.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from .._util.data import SCHEMA_VERSION, read_json, save_arrays, write_json
from .._util.files import NotWritable, sha256_file, sync, where_it_leads, writing
from .._util.lock import FolderLock, abandoned
from ..errors import BadFile, KtError, tell_user, warn_user
from . import parallel, provenance
from .provenance import envelope, git_describe

DEMO_FACTS = Path(__file__).parents[1] / "demo" / "facts.jsonl"
MANIFEST = "manifest.json"
RESULTS = "results.json"
ARRAYS = "arrays.safetensors"
ASIDE = "kt-rank-"
FILES = {
    "trace": ARRAYS,
    "exact": "exact.safetensors",
    "probe": "probe.safetensors",
    "residual": "residual.safetensors",
    "balance": "balance.json",
    "edit": "edit.safetensors",
    "before": "before.json",
    "before_otherwise": "before.otherwise.json",
    "after_otherwise": "after.otherwise.json",
    "after": "scores.json",
    "control": "control.json",
    "steps": "steps.json",
    "abilities": "abilities.json",
    "case": "case.json",
}
"""File names of the results in a run folder."""


def default_folder(command: str, slug: str, root: str | os.PathLike[str] = "runs") -> Path:
    """`runs/<UTC time>-<command>-<slug>`, numbered if two runs start in one second."""
    stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    name = f"{stamp}-{command}-{re.sub(r'[^A-Za-z0-9.]+', '-', slug).strip('-.')[:40] or 'model'}"
    paths = (Path(root) / (name if n == 1 else f"{name}-{n}") for n in range(1, 10_000))
    return next(path for path in paths if not path.exists())


@dataclass
class RunFolder:
    """`with RunFolder(path, command="alpha", argv=...) as run:` then `run.results = ...; run.arrays = ...`."""

    path: Path
    command: str
    argv: Sequence[str] = ()
    results: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    keep: bool = True  # False: a dry run, whose folder is deleted
    overwrite: bool = False  # a finished run of this name moves aside
    continues: bool = False  # the run of this name is an earlier state of this one, and all of it is carried over

    def __post_init__(self) -> None:
        self.path = Path(self.path)
        self._started = datetime.now(timezone.utc)
        self._clock = time.perf_counter()
        self._made: list[Path] = []
        self._lock: FolderLock | None = None
        self._place = self.path  # or the folder that it is a link to

    def __enter__(self) -> RunFolder:
        parallel.on_rank_zero(f"the run folder {self.path}", self._begin)
        if not parallel.is_main():
            self._begin_aside()
        return self

    def _begin(self) -> None:
        self._place = where_it_leads(self.path)  # once: what becomes a link meanwhile leads nowhere
        final = self._final
        if final.exists() and not final.is_dir():
            raise NotWritable(f"cannot write {self.path}: it is a file; name a folder with --out")
        if final.is_dir() and any(final.iterdir()) and not is_run(final):
            if any(final.rglob("settings.json")):
                raise NotWritable(
                    f"{self.path} holds a run that was cut; go on with --resume, or name another with --out"
                )
            raise NotWritable(f"{self.path} is not empty and not a run of kt; name another folder with --out")
        if final.resolve() == Path.cwd().resolve():
            raise NotWritable(f"{self.path} is the current folder; name a folder inside it with --out")
        if self.keep and not (self.overwrite or self.continues) and is_finished(final):
            raise NotWritable(
                f"{self.path} holds a run already; name another folder with --out, or --overwrite moves that one aside"
            )
        with writing(self.path):
            self._made = [p for p in final.parents if not p.exists()]
            final.parent.mkdir(parents=True, exist_ok=True)
            clear_leftovers(final)
            self._temporary = final.with_name(f"{final.name[:100]}.tmp-{secrets.token_hex(4)}")
            try:
                self._temporary.mkdir()
                self._lock = FolderLock(self._temporary)
            except OSError:
                self._remove()
                raise

    def _begin_aside(self) -> None:
        """Fill a temporary folder, in processes other than rank 0; it is deleted at the end."""
        # Delete old folders of killed processes; a new folder may not be locked yet.
        for folder in Path(tempfile.gettempdir()).glob(f"{ASIDE}*"):
            with suppress(OSError):
                if time.time() - folder.stat().st_mtime > 3600 and abandoned(folder):
                    shutil.rmtree(folder, ignore_errors=True)
        self._temporary = Path(tempfile.mkdtemp(prefix=ASIDE))
        self._lock = FolderLock(self._temporary)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None or not self.keep or not parallel.is_main():
            self._remove()
            self._rename_in(error)
            return
        try:
            self._finish()
        except BaseException as late:
            self._remove()
            self._rename_in(late)
            raise

    @property
    def _final(self) -> Path:
        return self._place.absolute()

    @property
    def folder(self) -> Path:
        """The temporary folder, until it is renamed."""
        return self._temporary

    def file(self, name: str) -> Path:
        """The current path of a file that will be `name` in the finished folder."""
        return self._temporary / name

    def describe_model(self, model: Any) -> None:
        """Record the model, with a fingerprint of its weights, since a name may later stand for other weights."""
        self.manifest["model"] = {
            "id": model.name,
            "revision": getattr(model, "revision", None),
            "fingerprint": model.fingerprint(),
        }
        if getattr(model, "chat", None) is not None:
            self.manifest["chat"] = model.chat.frame.as_dict()
        self.manifest["dtype"] = str(model.dtype).removeprefix("torch.")
        self.manifest["device"] = str(model.device)

    def describe_data(self, source: str, n: int, skipped: Mapping[str, int] | None = None) -> None:
        """Record the facts' source as typed, its SHA-256 if it is a file, and how many were read and skipped."""
        file = DEMO_FACTS if source == "demo" else Path(source)
        digest = sha256_file(file) if file.is_file() else None
        self.manifest["data"] = {"source": source, "sha256": digest, "n": n, "skipped": dict(skipped or {})}

    def _finish(self) -> None:
        self.manifest = {
            "command": self.command,
            "command_line": ["kt", *self.argv],
            "versions": provenance.versions(),
            "start": self._started.isoformat(timespec="seconds"),
            "duration_seconds": round(time.perf_counter() - self._clock, 3),
            "peak_memory_bytes": provenance.peak_memory(),
            "processes": parallel.count(),
            "git": git_describe(),
            **self.manifest,
        }
        write_json(self.file(RESULTS), envelope(self.manifest, self.results))
        if self.arrays:
            save_arrays(self.file(ARRAYS), self.arrays, {"kind": self.command})
        self.manifest["files"] = sorted(
            str(p.relative_to(self._temporary)) for p in self._temporary.rglob("*") if p.is_file()
        )
        write_json(self.file(MANIFEST), self.manifest)
        sync_all(self._temporary)
        with writing(self.path):
            self._take_name()
        if self._lock is not None:
            self._lock.release()

    def _take_name(self) -> None:
        final = self._final
        if is_finished(final) and not (self.overwrite or self.continues):
            self.path = _free(self._place, "-", 2)
            warn_user(f"another run has taken {final.name} meanwhile; this one is {self.path}")
            self._temporary.rename(self.path)
            return
        old = None if self.continues and not holds_edit(final) else self.make_room()
        try:
            _swap(self._temporary, final)
        except BaseException:
            if old is not None and not final.exists():
                old.rename(final)
            raise

    def make_room(self) -> Path | None:
        """Move a finished run of this name, or a folder with an edit in it, aside now, and say where it is."""
        if not parallel.is_main() or not (is_finished(final := self._final) or holds_edit(final)):
            return None
        old = _free(self._place, ".replaced-", 1)
        final.rename(old)
        tell_user(f"the run that was {self.path} is {old} now")
        return old

    def _rename_in(self, error: BaseException | None) -> None:
        """Replace the temporary folder by the user's folder in an error's message."""
        if isinstance(error, KtError):
            error.args = (str(error).replace(str(self._temporary), str(self.path)),)

    def _remove(self) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)
        if self._lock is not None:
            self._lock.release()
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()


def _free(path: Path, between: str, first: int) -> Path:
    """The path with the first number behind its name that nothing has."""
    names = (path.with_name(f"{path.name}{between}{n}") for n in range(first, 10_000))
    return next(name for name in names if not name.exists())


def holds_edit(folder: Path) -> bool:
    """Whether an edit lies in the folder, at any depth."""
    return any(folder.rglob("*edit*.safetensors"))


def _swap(new: Path, final: Path) -> None:
    """Replace `final` by `new`; an earlier state is renamed first, and renamed back if that fails."""
    if not final.exists():
        new.rename(final)
        return
    old = final.with_name(f"{final.name[:100]}.old-{secrets.token_hex(4)}")
    final.rename(old)
    try:
        new.rename(final)
    except BaseException:
        old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def clear_leftovers(final: Path) -> None:
    """Delete temporary folders that killed processes left beside `final`; restore a previous run that was renamed."""
    name = re.escape(final.name[:100])
    for path in sorted(each for each in final.parent.iterdir() if not each.is_symlink()):
        if re.fullmatch(rf"{name}\.tmp-[0-9a-f]{{8}}", path.name) and path.is_dir() and abandoned(path):
            shutil.rmtree(path, ignore_errors=True)
        elif re.fullmatch(rf"{name}\.old-[0-9a-f]{{8}}", path.name) and path.is_dir():
            if final.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.rename(final)


def sync_all(folder: Path) -> None:
    """Flush every file below a folder to disk, so that the folder is complete before it is renamed."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def is_run(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder holds a run of `kt`, finished or not."""
    with suppress(BadFile):
        manifest = read_json(Path(folder) / MANIFEST)
        return "schema_version" in manifest and "command_line" in manifest
    return False


def is_finished(folder: Path) -> bool:
    """Whether the folder holds a finished run of `kt`."""
    return is_run(folder) and not read_json(folder / MANIFEST).get("unfinished")


def read_run(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(manifest, results) of a finished run.

    Raises:
        BadFile: the folder holds no run, an unfinished one, or one of another schema version.
    """
    folder = Path(folder)
    if not is_run(folder):
        raise BadFile(f"{folder} is not a run folder of kt (no {MANIFEST} in it); name one that a command wrote")
    manifest = read_json(folder / MANIFEST)
    if manifest.get("unfinished"):
        raise BadFile(f"{folder}: the run is unfinished; go on with it: repeat its command with --resume {folder}")
    if manifest["schema_version"] != SCHEMA_VERSION:
        raise BadFile(
            f"{folder}: schema_version {manifest['schema_version']}, but this kt reads {SCHEMA_VERSION}; "
            "run the command again"
        )
    return manifest, read_json(folder / RESULTS)
