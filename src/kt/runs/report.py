"""Run folders as one HTML page: a section for each result that lies in them.

`RESULTS` is the list of files that hold a result, each with the class that loads it. A class is named as text and
imported when its file is there: the classes stand in higher layers.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from .._util.data import complete_file, read_json
from ..report import Card, Section, build
from .folder import FILES, MANIFEST
from .provenance import versions

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


def results(folder: str | Path) -> Iterator[tuple[Path, Any]]:
    """Every result of a run folder: its file, and the object loaded from it.

    Args:
        folder: a run folder, or one that a command is still filling.

    Raises:
        BadFile: a file is not the result that its name says.
    """
    for name, place in RESULTS.items():
        if (path := Path(folder) / name).exists():
            module, _, cls = place.partition(":")
            with complete_file(path, "result of kt", "run its command again"):
                result = getattr(import_module(module), cls).load(path)
            yield path, result


def write_report(folders: Sequence[str | Path], out: str | Path, title: str = "kt report") -> Path:
    """Write every result of the folders as one offline HTML page.

    Args:
        folders: run folders.
        out: the page to write.
        title: of the page.

    Returns:
        The page's path.

    Raises:
        BadFile: a file is not the result that its name says.
        NotWritable: the page cannot be written.
    """
    sections: list[Section] = []
    cards: list[Card] = []
    for folder in map(Path, folders):
        name = f"{folder.name}: " if len(folders) > 1 else ""
        for path, result in results(folder):
            with complete_file(path, "result of kt", "run its command again"):
                section, headline = result.section(), result.headline()
            sections.append(Section(name + section.title, section.blocks))
            cards += [Card(name + card.name, card.value, card.note, card.digits) for card in headline]
    return build(title, sections, out, meta=_meta([Path(f) for f in folders]), summary=cards)


def _meta(folders: Sequence[Path]) -> dict[str, Any]:
    """Each run's command line from its manifest, which a run that is being written does not have yet; versions."""
    about: dict[str, Any] = {}
    for folder in folders:
        if (folder / MANIFEST).exists():
            manifest = read_json(folder / MANIFEST)
            with complete_file(folder / MANIFEST, "manifest", "run the command again"):
                about[folder.name] = shlex.join(manifest["command_line"])
    return about | {f"{name} version": version for name, version in versions().items()}
