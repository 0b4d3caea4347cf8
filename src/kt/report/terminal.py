"""A table as rich draws it in a terminal; no text in it is read as mark-up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._util.text import visible, visible_lines
from .table import Table

if TYPE_CHECKING:
    from rich.table import Table as RichTable


def rich_table(table: Table) -> RichTable:
    """Title above, caption below; columns of plain numbers are set to the right."""
    from rich.table import Table as RichTable
    from rich.text import Text

    # As `Text`, in which rich reads no mark-up: names of models and texts of facts stand in titles too.
    above = Text(visible(table.title), style="table.title")
    below = Text(visible_lines(table.caption), style="table.caption") if table.caption else None
    drawn = RichTable(title=above, title_justify="left", caption=below, caption_justify="left")
    heads = table.heads
    for i, column in enumerate(heads):
        numeric = all(column.format is None and isinstance(row[i], int | float | None) for row in table.rows)
        drawn.add_column(Text(visible(column.name)), justify="right" if numeric else "left", overflow="fold")
    for row, texts in zip(table.rows, table.texts(), strict=True):
        styles = [column.style(value) if column.style else "" for column, value in zip(heads, row, strict=True)]
        drawn.add_row(*(Text(visible_lines(text), style) for text, style in zip(texts, styles, strict=True)))
    return drawn
