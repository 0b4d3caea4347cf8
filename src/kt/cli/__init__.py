"""The command line. Typer: parse, call one library function, write files, print one table."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as an interrupt does."""


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of `kt`."""
    try:
        if argv is None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _terminated)  # app.py takes it over, a second later
        from .app import main as run

        return run(argv)
    except KeyboardInterrupt as error:  # before `run` catches it, or after
        terminated = isinstance(error, Terminated)
        sys.stderr.write(f"kt: {'terminated' if terminated else 'interrupted'}; nothing was written\n")
        return 143 if terminated else 130


def _terminated(*_: object) -> None:
    raise Terminated
