"""The property that every loader has: from any bytes it gives its object, or a documented error of one line."""

from __future__ import annotations

import shutil
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kt.errors import KtError

PACKAGE = Path(__file__).parents[2] / "src" / "kt"
Seeds = Mapping[str, bytes]
SECONDS = 20.0
"""Of processor time: what a loader may take for one small file on a slow machine."""


class Loader(NamedTuple):
    """What reads a file of some name; `seeds` are whole files by name, `cost` divides the number of examples."""

    name: str
    seeds: Seeds
    broken: Callable[[bytes], st.SearchStrategy[bytes]]
    load: Callable[[Path], object]
    cost: int = 1

    def files(self) -> st.SearchStrategy[tuple[str, bytes]]:
        """(file's name, its bytes), made from one of the seeds."""
        made = [self.broken(raw).map(lambda content, name=name: (name, content)) for name, raw in self.seeds.items()]
        return st.one_of(made)


def outcome(loader: Loader, name: str, content: bytes, folder: Path) -> str:
    """`loaded` or `refused`.

    Raises:
        AssertionError: an error of several lines, or a flood of warnings.
        Exception: whatever the loader lets through.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = folder / Path(name).name
    path.write_bytes(content)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            loader.load(path)
        except KtError as error:
            found = str(error)
            assert found and "\n" not in found and len(found) < 4000, f"no single line: {found[:200]!r}"
            return "refused"
        finally:
            assert len(said) < 20, f"{len(said)} warnings"
    return "loaded"


class Count(NamedTuple):
    """How many files a loader loaded, refused in one line, and failed on; `failures` say how, each kind once."""

    loader: str
    loaded: int
    refused: int
    failed: int
    failures: tuple[str, ...]


def count(loader: Loader, examples: int, folder: Path) -> Count:
    """The loader's property over so many broken files (fewer where one costs more), the same ones every time."""
    counts, failures = Counter[str](), dict[str, None]()

    @settings(
        max_examples=max(5, examples // loader.cost),
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(loader.files())
    def each(file: tuple[str, bytes]) -> None:
        start = time.process_time()
        try:
            counts[outcome(loader, *file, folder)] += 1
        except Exception as error:  # whatever it is, it is what is looked for
            counts["failed"] += 1
            failures[f"{type(error).__name__} at {_place(error)}: {' '.join(str(error).split())[:160]}"] = None
        if time.process_time() - start > SECONDS:
            counts["failed"] += 1
            failures[f"took more than {SECONDS} s: {file[1][:40]!r}"] = None

    each()
    return Count(loader.name, counts["loaded"], counts["refused"], counts["failed"], tuple(failures))


def _place(error: BaseException) -> str:
    """The last line of kt that an error went through."""
    inside = [step for step in traceback.extract_tb(error.__traceback__) if PACKAGE.as_posix() in step.filename]
    return f"{Path(inside[-1].filename).relative_to(PACKAGE)}:{inside[-1].lineno}" if inside else "the property itself"
