"""The edits that `--edit` names, opened and held against the model before any work is done with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..editing.stack import AnyEdit
    from .session import Session


def open_edit(s: Session, path: Path) -> AnyEdit:
    """The edit or the stack in a file, as one that fits the session's model; the session's options hold `force`.

    The file is read before the model loads, which takes longer.

    Raises:
        BadFile: it is no edit.
        KtError: the model's weights are not those it was solved for, and there is no `--force`.
    """
    return open_edits(s, {"": path})[""]


def open_edits(s: Session, paths: dict[str, Path]) -> dict[str, AnyEdit]:
    """Several, by the same names."""
    from ..editing.stack_file import open_edit as opened

    edits = {name: opened(path) for name, path in paths.items()}
    return {name: edit.for_model(s.load_model(), s.options.force) for name, edit in edits.items()}
