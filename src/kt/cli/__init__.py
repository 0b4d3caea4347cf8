"""The command line. Typer: parse, call one library function, write files, print one table."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of `kt`."""
    try:
        from .app import main as run

        return run(argv)
    except KeyboardInterrupt:  # before `run` catches it, or after
        sys.stderr.write("kt: interrupted; nothing was written\n")
        return 130
