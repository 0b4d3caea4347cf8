"""`kt apply-edit` and `kt cov`: solve an edit and write it; the key moments that solving needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .._util.text import cell, interval
from .session import Session

if TYPE_CHECKING:
    from ..editing import Edit


def show_requests(s: Session, edits: Sequence[Edit]) -> None:
    """Target and old answer before and after; beside them the control of a joint edit."""
    reports = [r for edit in edits for r in edit.report]
    held = any(r.control_prob is not None for r in reports)
    columns = ["prompt", "target", "prob", *(["MLP alone"] if held else []), "rank", "old answer", "prob", "rank"]
    rows = []
    for r in reports:
        control = [r.control_prob] if held else []
        target = [r.target, arrow(r.target_prob), *control, arrow(r.target_rank)]
        rows.append([r.prompt, *target, r.answer, arrow(r.answer_prob), arrow(r.answer_rank)])
    about = edits[-1].manifest
    s.screen.table(f"{about.get('method')}, alpha {cell(about.get('alpha'))}", columns, rows)


def spread(mean: dict[str, Any]) -> str:
    return interval(mean["mean"], mean["ci95"])


def arrow(pair: tuple[Any, Any] | None) -> str:
    """`0.012 → 0.981`."""
    return "–" if pair is None else f"{cell(pair[0])} → {cell(pair[1])}"
