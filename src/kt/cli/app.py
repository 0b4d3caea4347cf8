"""The `kt` command line: its commands, and how their failures reach the user."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer

from ..artifacts import why_not_written
from ..errors import KtError
from . import edit, judge, lists, loop, trace
from .console import one_line_warnings

EPILOG = (
    "Every flag is also KT_<FLAG> in the environment and a key in a --config file. "
    "Exit code: 0 done, 1 the work failed, 2 the input was wrong."
)

app = typer.Typer(
    name="kt",
    help="Find where a language model keeps a fact, and rewrite it there.",
    epilog=EPILOG,
    no_args_is_help=True,
    # Rich's help and tracebacks cost a third of a second at every start.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# UsageError has no public name of its own in typer; it is what BadParameter is derived from.
UsageError: type[Any] = typer.BadParameter.__mro__[1]

for room in (loop, trace, edit, judge, lists):
    room.register(app)


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
) -> None:
    if version:
        from .. import __version__

        typer.echo(f"kt {__version__}")
        raise typer.Exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run `kt` and return its exit code; whatever goes wrong is one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if hasattr(signal, "SIGTERM"):
        signal.signal(signal.SIGTERM, _terminated)
    try:
        with one_line_warnings(_say):
            command = typer.main.get_command(app)
            code = command.main(args=arguments, prog_name="kt", standalone_mode=False, obj=tuple(arguments))
    except BaseException as error:
        return _explain(error)
    if code == 130:
        _say("kt: interrupted; nothing was written")
    return code if isinstance(code, int) else 0


def _terminated(*_: object) -> None:
    # As an exception it unwinds through the run folders, which remove what is half written.
    raise SystemExit(143)


def _explain(error: BaseException) -> int:
    """One line on stderr, and the exit code."""
    if os.environ.get("KT_DEBUG") == "1":
        traceback.print_exception(error)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, BrokenPipeError):
        _discard_stdout()
        return 1
    if isinstance(error, KeyboardInterrupt):
        _say("kt: interrupted; nothing was written")
        return 130
    if isinstance(error, UsageError) and hasattr(error, "ctx"):
        path = error.ctx.command_path if error.ctx is not None else "kt"
        _say(f"kt: error: {_line(error.format_message())} (see {path} --help)")
        return 2
    refusal = why_not_written(error) if isinstance(error, OSError) else None
    known = refusal or error
    if isinstance(known, KtError):
        _say(f"kt: error: {_line(known)}")
        return known.exit_code
    _say(f"kt: error: {type(error).__name__}: {_line(error)[:300]} (a bug? KT_DEBUG=1 shows the traceback)")
    return 1


def _line(message: object) -> str:
    return " ".join(str(message).split())


def _say(message: str) -> None:
    sys.stderr.write(message + "\n")


def _discard_stdout() -> None:
    """Python flushes stdout at exit once more; into a closed pipe that would print a second error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
