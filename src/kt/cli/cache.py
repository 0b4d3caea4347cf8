"""`kt cache`: what the cache holds, and how it is emptied."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .._util.lock import default_cache
from .._util.text import count, size_text
from ..report import Table
from ..report.table import shown
from .command import BadOption, Options, option_of
from .cov import CovOptions
from .options import Opt
from .session import screen_for, write_result

if TYPE_CHECKING:
    from ..runs.cache import Entry

COLUMNS = ["file", "is", "model", "weight", "corpus", "tokens", "size", "age"]
SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@dataclass(frozen=True)
class CacheOptions(Options):
    action: Annotated[str, typer.Argument(metavar="[ls|rm]")] = "ls"
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME...", help="rm: files, as ls names them, or how one file's name begins."),
    ] = None
    model: Annotated[str | None, Opt("--model", "-m", help="Only what is of this model, as ls names it.")] = None
    older_than: Annotated[str | None, Opt("--older-than", help="Only what was written before: 30d, 12h, 2w.")] = None
    all: Annotated[bool, Opt("--all", help="rm: everything.")] = False
    cache: Annotated[Path | None, option_of(CovOptions, "cache")] = None


def cache(options: CacheOptions) -> None:
    """List what is kept of earlier runs (second moments, factors, scores), or remove it; nothing is asked."""
    from ..runs.cache import chosen, entries, remove

    if options.action not in ("ls", "rm"):
        raise BadOption(f"kt cache {options.action!r}: unknown; write kt cache ls|rm")
    names, age = options.names or [], _seconds(options.older_than)
    by_condition = options.all or options.model is not None or age is not None
    if options.action == "ls" and (names or options.all):
        raise BadOption("kt cache ls takes no names and no --all; it lists all, or by --model and --older-than")
    if options.action == "rm" and bool(names) == by_condition:
        raise BadOption("kt cache rm takes names (kt cache ls lists them), or --model, --older-than or --all")
    folder, screen = options.cache or default_cache(), screen_for(options)
    found = entries(folder)
    if options.action == "rm" or by_condition:
        found = chosen(found, names, options.model, age, options.all)
    size = remove(found) if options.action == "rm" else sum(entry.size for entry in found)
    done = "removed from" if options.action == "rm" else "in"
    title = f"{count(len(found), 'file')}, {size_text(size)}, {done} {folder}"
    screen.tables(Table(COLUMNS, rows(found), title)) if found else screen.say(f"kt: {title}")
    write_result(options, {"folder": str(folder), "action": options.action, "files": [e.as_dict() for e in found]})


def rows(found: Sequence[Entry]) -> list[list[str]]:
    return [
        [
            entry.short,
            f"{entry.kind}, left by a killed run" if entry.stray else entry.kind,
            *map(shown, (entry.model or None, entry.weight or None, entry.corpus or None)),
            "–" if entry.n_tokens is None else f"{entry.n_tokens:,}",
            size_text(entry.size),
            _age(entry.age),
        ]
        for entry in found
    ]


def _age(seconds: float) -> str:
    unit = next((u for u in ("d", "h") if seconds >= 2 * SECONDS[u]), "m")
    return f"{seconds / SECONDS[unit]:.0f} {unit}"


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    if not (read := re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", text.strip())):
        raise BadOption(f"--older-than {text!r}: write a number and m, h, d or w: 30d")
    return float(read[1]) * SECONDS[read[2]]
