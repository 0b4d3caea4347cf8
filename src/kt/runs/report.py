"""Run folders as results: `RESULTS` lists the files that hold one, each with the class that loads it.

A class is named as text and imported when its file is there: the classes stand in higher layers.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from .._util.data import complete_file, read_json
from .folder import FILES, MANIFEST

RESULTS = {
    FILES["trace"]: "kt.tracing:Trace",
    FILES["balance"]: "kt.tracing:Balance",
    FILES["probe"]: "kt.probing:Probe",
    FILES["edit"]: "kt.editing:Edit",
    FILES["steps"]: "kt.experiments.sequence:Steps",
    FILES["after"]: "kt.evaluation.scores:Comparison",
    FILES["residual"]: "kt.residual:Residual",
    FILES["abilities"]: "kt.capability:Abilities",
    FILES["case"]: "kt.experiments.case_study:CaseStudy",
    "sweep.json": "kt.experiments:Sweep",
}
"""File in a run folder -> class that loads it, in the order of the loop: trace, balance, edit, scores."""


@dataclass(frozen=True)
class Run:
    """A run: its folder as it will be called, its manifest, and (while it is being written) where its files are now."""

    folder: Path
    manifest: Mapping[str, Any]
    files: Path

    @classmethod
    def of(cls, folder: str | Path) -> Run:
        """A run folder on disk; without a manifest (files that were put together by hand) it has no command."""
        path = Path(folder) / MANIFEST
        manifest = read_json(path) if path.exists() else {}
        return cls(Path(folder), manifest, Path(folder))

    @property
    def command(self) -> str:
        """Its command line, as a shell takes it."""
        with complete_file(self.files / MANIFEST, "manifest", "run the command again"):
            return shlex.join(self.manifest.get("command_line", ()))

    @cached_property
    def results(self) -> list[tuple[Path, Any]]:
        """Every result of the run: its file, and the object loaded from it.

        Raises:
            BadFile: a file is not the result that its name says.
        """
        return list(self._results())

    def _results(self) -> Iterator[tuple[Path, Any]]:
        for name, place in RESULTS.items():
            if (path := self.files / name).exists():
                module, _, cls = place.partition(":")
                with complete_file(path, "result of kt", "run its command again"):
                    result = getattr(import_module(module), cls).load(path)
                yield path, result
