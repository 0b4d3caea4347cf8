"""One HTML report from text, tables, key figures and plotly figures."""

from __future__ import annotations

from .html import Card, Figure, Section, Table, Text, build, render

__all__ = ["Card", "Figure", "Section", "Table", "Text", "build", "render"]
