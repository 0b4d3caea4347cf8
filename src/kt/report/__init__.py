"""Tables, the interface of results, and one HTML page from text, tables, key figures and plotly figures."""

from __future__ import annotations

from .html import App, Card, Figure, Section, Text, build, render
from .result import Result, Shown
from .table import Column, Table

__all__ = ["App", "Card", "Column", "Figure", "Result", "Section", "Shown", "Table", "Text", "build", "render"]
