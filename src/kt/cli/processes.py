"""One command in several processes (torchrun): which commands share work, which process prints, how all end.

Rank 0 speaks for all. torchrun ends the others as soon as one process has ended with an error, so the others wait with
theirs until rank 0 has said what there is to say.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..runs import parallel
from ..runs.provenance import versions
from . import interrupt
from .command import BadOption, Options, as_flag
from .console import say_line

SHARED = ("heatmap", "alpha", "probe", "cov", "apply-edit", "eval")
"""Commands whose work is shared out. The others run in rank 0 alone."""

LONG = ("demo", "train-editor", "abilities", "case", "sweep", "run")
"""Long commands that do not; they say so."""

LAST_WORD = 10.0
"""Seconds that rank 0 has to end after another process failed."""


def stands_by(arguments: Sequence[str]) -> bool:
    """Whether this process has nothing to do: the command runs in rank 0 alone, or only prints help."""
    return parallel.started_as() > 0 and (arguments[0] not in SHARED or not {"-h", "--help"}.isdisjoint(arguments))


def meet(options: Options, settings: Mapping[str, Any]) -> None:
    """Join the other processes, where the command shares its work with them.

    Raises:
        KtError: they were asked something else.
    """
    if parallel.started() == 1:
        return
    if options.command not in SHARED:
        if options.command in LONG and not options.quiet:
            say(f"kt: {options.command} does not share its work; of {parallel.started()} processes one is at work")
        return
    if getattr(options, "device_map", None) is not None:
        raise BadOption("--device-map spreads one model over all devices; leave it out, or start one process")
    parallel.join()
    parallel.assert_equal_on_ranks({as_flag(name): value for name, value in settings.items()} | {"kt env": versions()})


def speaks() -> bool:
    """Whether this process prints."""
    return parallel.started_as() == 0


def say(line: str) -> None:
    """One line on stderr, once for all processes."""
    if speaks() or parallel.heir():
        say_line(line.rstrip("\n"))


def last_word(line: str) -> None:
    """Print the line that ended the command, or this process alone; where rank 0 was killed, how to go on."""
    if speaks():
        say(line)
        return
    interrupt.undisturbed()
    told = interrupt.told_to_end(LAST_WORD)  # the launcher tells, when it has seen another process end
    if parallel.heir():
        say(interrupt.stopped())
    elif not told:
        say_line(f"kt: process {parallel.started_as()}: {line.removeprefix('kt: ')}")


def end(code: int) -> None:
    """End a process that was one of several."""
    if not parallel.joined():
        return
    if code == 0:
        parallel.leave()
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no orderly end: that would wait for processes that may be gone
