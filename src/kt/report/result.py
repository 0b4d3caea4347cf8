"""`Result`: the interface of every result. The command line, notebooks and the report are loops over it.

A result names its kind, how it was made, its tables and its figures. To add a figure, draw it in `kt.figures` and name
it in `figures()` of its result; the command's figure page, the report and `--html` then show it.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from .._util.text import visible_lines
from .html import Card, Figure, Section, Text
from .table import Table

LONGEST = 400
"""Characters of an object's own text in a notebook."""


@runtime_checkable
class Result(Protocol):
    """The interface of `Trace`, `Probe`, `Edit`, `Scores`, `Sweep` and every other result."""

    @property
    def kind(self) -> str:
        """The name under which its file says what it is."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Model, settings, seed: how it was made."""

    def tables(self) -> Sequence[Table]:
        """The tables that the command prints; the main table first."""

    def figures(self) -> Sequence[Figure]:
        """Every figure, drawn; the main figure first."""

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: plain values, every mean with n and its 95% interval."""


class Shown:
    """Base class of results: the parts of a page that most results do without, and the view in a notebook."""

    @property
    def heading(self) -> str:
        """The title of its section in a report."""
        return str(getattr(self, "kind", "")).capitalize()

    def notes(self) -> Sequence[str]:
        """Paragraphs above its figures."""
        return ()

    def headline(self) -> Sequence[Card]:
        """Its key figures, for the head of a report."""
        return ()

    def figures(self) -> Sequence[Figure]:
        """Every figure, drawn; none by default."""
        return ()

    def tables(self) -> Sequence[Table]:
        """The tables that the command prints; none by default."""
        return ()

    def section(self) -> Section:
        """Notes, figures, tables: its part of a report."""
        figures = [figure for figure in self.figures() if figure.only != "command"]
        tables = [table for table in self.tables() if table.only != "command"]
        notes = list(self.notes())
        return Section(self.heading, [*([Text(notes)] if notes else []), *figures, *tables])

    def _repr_html_(self) -> str:
        text = visible_lines(repr(self))
        parts = [f"<p>{html.escape(text if len(text) <= LONGEST else text[:LONGEST] + '…')}</p>"]
        return "".join(parts + [table._repr_html_() for table in self.tables() if table.only != "command"])
