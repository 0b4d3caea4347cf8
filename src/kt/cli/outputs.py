"""What a command may write over, checked before any work: no file that it reads, none that two of its options name,
none of another kind than the option writes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from .._util.data import read_json
from .._util.files import check_writable
from ..editing.file_kind import STACK
from ..errors import BadFile
from ..runs.folder import FILES, MANIFEST, RESULTS, is_run
from .command import BadOption, Options
from .options import RunOptions

KINDS = {
    "json": "no result that --json wrote",
    "html": "no page that kt wrote",
    "png": "no PNG",
    "svg": "no SVG",
}
"""Options that write a file, and what a file is that they do not write over."""
OTHERS = ("out", "to", "preset_to", "merge_to")
"""Options that write something else: a folder, or a file that has to be new."""
OWN = {MANIFEST, RESULTS, *FILES.values(), "sweep.json", "figures.html", "report.html"}
"""Files that a run writes into its folder (`--out`)."""
READ_AGAIN = (STACK, "balance", "scores", "edit steps", "case_study")
"""Kinds of JSON that kt reads again, which no `--json` writes."""
HEAD = 1 << 16
"""Bytes at the beginning of a page in which its generator stands."""


def check(options: Options) -> None:
    """Refuse outputs that would destroy a file of the user's.

    Raises:
        BadOption: one is a file that the command reads, or that another option writes; or, without `--overwrite`, it is
            there and of another kind.
        NotWritable: it cannot be written.
    """
    files = dict(outputs(options))
    others = {n: Path(p) for n in OTHERS if n not in files and (p := getattr(options, n, None)) is not None}
    lifted = isinstance(options, RunOptions) or "out" in files
    for name, path in files.items():
        flag = f"--{name} {path}"
        twin = next((n for n, other in (files | others).items() if n != name and same(path, other)), None)
        if twin is not None:
            raise BadOption(f"{flag}: --{twin.replace('_', '-')} writes there too; give each a file of its own")
        if "out" in others and any(same(path, others["out"] / own) for own in OWN):
            raise BadOption(f"{flag}: the run itself writes that file of its folder; name another file")
        if not path.is_file():  # new; or a device, a pipe
            continue
        if any(same(path, Path(word)) for word in words(options) if os.path.lexists(word)):
            raise BadOption(f"{flag}: the command reads that file; name another file to write")
        if not is_page(path) and (run := run_of(path)) is not None:
            raise BadOption(f"{flag}: is a file of the run {run}; name another file")
        if name in KINDS and not (lifted and getattr(options, "overwrite", False)) and not writes_over(name, path):
            or_else = ", or give --overwrite" * lifted
            raise BadOption(f"{flag}: is there already and is {KINDS[name]}; name another file{or_else}")
    if not isinstance(options, RunOptions):  # of several processes of a run one looks, once they have met
        check_places(options)


def check_places(options: Options) -> None:
    """That figures and results can be written where they are to be.

    Raises:
        NotWritable: with the reason.
    """
    for name, path in outputs(options):
        if name in KINDS:
            check_writable(path)


def outputs(options: Options) -> Iterator[tuple[str, Path]]:
    """The files that the options name to be written over, by option; `-` is no file."""
    for name in KINDS:
        if (path := getattr(options, name, None)) not in (None, "-"):
            yield name, Path(path)
    if hasattr(options, "runs") and (page := getattr(options, "out", None)) is not None:  # kt report, kt explore
        yield "out", Path(page)


def further(options: Options, named: Path) -> Path:
    """Where a further figure of `--png` or `--svg` goes, whose name kt chose: there, or with a number behind it where
    that would replace a file of the user's. The names are known once the work is done, too late to refuse them.
    """
    files = [other for _, other in outputs(options)]
    names = [named, *(named.with_stem(f"{named.stem}-{number}") for number in range(2, 10_000))]
    return next(each for each in names if not any(same(each, file) for file in files) and ours(options, each))


def ours(options: Options, path: Path) -> bool:
    """Whether a picture may go to a name of kt's choice: nothing is there, or a picture that kt drew; with
    `--overwrite` any file that the command does not read, and that is of no run."""
    from ..figures.save import drew

    if not os.path.lexists(path):
        return True
    if not path.is_file() or any(same(path, Path(word)) for word in words(options) if os.path.lexists(word)):
        return False
    return run_of(path) is None and (bool(getattr(options, "overwrite", False)) or drew(path))


def words(options: Options) -> Iterator[str]:
    """Everything typed that may name a file to be read: alone, in a list, or as NAME=FILE."""
    written = {*KINDS, *OTHERS, "command", "argv"}
    for field in fields(options):
        value: Any = getattr(options, field.name)
        if field.name in written:
            continue
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, str | Path):
                yield str(each)
                yield from map(str.strip, re.split("[,=]", str(each)))


def same(one: Path, other: Path) -> bool:
    """Whether two names are of one place, which need not be there; devices and pipes may be written twice."""
    if one.exists() and other.exists():
        return one.samefile(other) and (one.is_file() or one.is_dir())
    return os.path.realpath(one) == os.path.realpath(other)


def run_of(path: Path) -> Path | None:
    """The run folder that holds a file as its own."""
    path = Path(os.path.realpath(path))
    for folder in path.parents:
        if (folder / MANIFEST).is_file() and is_run(folder):
            listed = read_json(folder / MANIFEST).get("files")
            inside = path.relative_to(folder).as_posix()
            return folder if not isinstance(listed, list) or inside in [*listed, MANIFEST] else None
    return None


def writes_over(kind: str, path: Path) -> bool:
    """Whether an option may write over a file: one of its own kind, or an empty one."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    if not head:
        return True
    if kind == "json":
        return is_result(path)
    if kind == "html":
        return is_page(path)
    return head.startswith(b"\x89PNG\r\n\x1a\n") if kind == "png" else head.lstrip()[:1] == b"<" and b"<svg" in head


def is_page(path: Path) -> bool:
    """Whether a file is an HTML page that kt wrote, by its generator."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    return head.startswith(b"<!doctype html>") and b'<meta name="generator" content="kt">' in head


def is_result(path: Path) -> bool:
    """Whether a file is JSON as `--json` writes it."""
    try:
        content = read_json(path)
    except BadFile:
        return False
    return isinstance(content.get("schema_version"), int) and content.get("kind") not in READ_AGAIN
