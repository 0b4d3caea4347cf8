"""The command line. Typer: parse, call one library function, write files, print one table."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of `kt`."""
    from .app import main as run

    return run(argv)
