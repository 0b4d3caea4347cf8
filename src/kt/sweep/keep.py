"""The points of a sweep as files: each is written when it is done, so an interrupted sweep loses at most one.

    FOLDER/settings.json          what was swept; a sweep that goes on must have the same
    FOLDER/points/000-0.1.json    one finished point, with its values by record

Until the sweep is done, `manifest.json` says so; a finished run folder of `kt sweep` holds the same files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..artifacts import plain, read_json, whole, write_json
from ..errors import KtError
from ..journal import SETTINGS, claim
from .grids import Point
from .result import Row

POINTS = "points"


class Kept:
    """Rows by point, in a folder or (without one) nowhere.

    Args:
        settings: what was swept; must be the same when a sweep goes on.
        beside: what else the settings file holds, to be read and not compared (a traced α).

    Raises:
        KtError: `resume` names a folder without a sweep, or the sweep there had other settings; or, without `resume`,
            the folder holds one already.
    """

    def __init__(
        self,
        folder: str | Path | None,
        settings: Mapping[str, Any],
        resume: bool,
        beside: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.settings, self.beside = plain(dict(settings)), plain(dict(beside or {}))
        self._begun = False
        if self.folder is None:
            if resume:
                raise KtError("resume needs the folder of the sweep that is to go on: give folder=")
            return
        self._begun = claim(self.folder, self.settings, resume, "sweep")

    def row(self, number: int, point: Point) -> Row | None:
        """The finished row of a point."""
        if self.folder is None or not (path := self._path(number, point)).exists():
            return None
        with whole(path, "point", "delete it, and it is done again"):
            return Row.of(read_json(path))

    def add(self, number: int, point: Point, row: Row) -> None:
        if self.folder is None:
            return
        if not self._begun:
            # With the first finished point and not before: a sweep that fails at once leaves nothing behind.
            write_json(self.folder / SETTINGS, self.beside | self.settings)
            self._begun = True
        write_json(self._path(number, point), row.as_dict(whole=True))

    def done(self, points: Sequence[Point]) -> int:
        """How many points are finished."""
        return sum(self.folder is not None and self._path(i, p).exists() for i, p in enumerate(points))

    def _path(self, number: int, point: Point) -> Path:
        assert self.folder is not None
        slug = re.sub(r"[^A-Za-z0-9.,]+", "-", f"{point.series}-{point.label}").strip("-")[:60]
        return self.folder / POINTS / f"{number:03d}-{slug}.json"
