"""Errors that users see: one line that says what is wrong, where, and what to do instead. And two warnings."""

from __future__ import annotations

import sys
import warnings
from functools import cache
from importlib.util import find_spec

DISTRIBUTION = "kt-interp"
"""The name under which kt is installed. The name `kt` on the package index belongs to somebody else's project."""


def install_hint(extra: str) -> str:
    """The command that installs kt with one of its extras, as error messages give it.

    Args:
        extra: a name from `[project.optional-dependencies]` of pyproject.toml, such as "lora".
    """
    return f"pip install '{DISTRIBUTION}[{extra}]'"


EXTRAS = {
    "anywidget": "widget",
    "traitlets": "widget",
    "datasets": "data",
    "pyarrow": "data",
    "gguf": "gguf",
    "lm_eval": "lm-eval",
    "peft": "lora",
}
"""Packages that kt imports without requiring them, and the extra that brings each."""


def need(module: str, purpose: str, instead: str = "", kind: type[KtError] | None = None) -> None:
    """Refuse, before any work, what an optional package is missing for; imports nothing of it.

    Args:
        module: a package of `EXTRAS`, or a module in one.
        purpose: what needs it, as the message begins.
        instead: another way, as the message ends.
        kind: of the error; KtError where None.

    Raises:
        KtError: it is not installed.
    """
    package = module.partition(".")[0]
    try:
        there = find_spec(module) is not None
    except ModuleNotFoundError:  # the package of a module in one
        there = False
    except ValueError:  # it is imported, and was not loaded from a file
        there = True
    if not there:
        raise (kind or KtError)(f"{purpose} needs {package}; {install_hint(EXTRAS[package])}{instead}")


def said_by(error: BaseException, most: int = 300) -> str:
    """What another program's error says: one line of at most so many characters, its type where it has no words."""
    return " ".join(str(error).split())[:most] or type(error).__name__


class FailedCheck(UserWarning):
    """A limit of its verdict that an edit passed."""


class KtError(Exception):
    """Wrong input. The command line prints the message on one line and exits with code 2.

    `passing`: the same command may succeed another time.

    Examples:
        >>> try:
        ...     kt.load_facts("none.jsonl")
        ... except kt.KtError as error:
        ...     print(type(error).__name__, str(error)[:25])
        BadFile none.jsonl does not exist
    """

    exit_code = 2
    passing = False


class WorkFailed(KtError):
    """The input was right but the work failed or a check did not hold: exit code 1."""

    exit_code = 1
    passing = True


class Diverged(WorkFailed):
    """A training whose numbers are no longer finite. It would end there again: there is nothing to go on with."""

    passing = False


class NothingToWrite(WorkFailed):
    """Every request of an edit is left as it is: earlier edits hold its key for good, a guard or a bound leaves it
    alone, or the model says its target already. A run in steps goes on with the next one."""

    passing = False


class UnknownModel(KtError):
    """No model of that name, no tokenizer beside it, or a structure that `kt` does not know."""


class UnknownSite(KtError):
    """The model has no such layer or module."""


class SubjectNotFound(KtError):
    """The subject does not occur in its prompt."""


class BadFact(KtError):
    """A fact or an edit request that cannot be traced or edited as written."""


class BadFile(KtError):
    """A file that is missing, broken, or not what its name says."""


class ShortcutOff(UserWarning):
    """The work is done the long way: the numbers are the same, and cost more."""


@cache
def shortcut_off(text: str) -> None:
    """Warn that a shortcut is off: which one, why, and what that costs. Each text once in a process."""
    warn_user(text, ShortcutOff)


def tell_user(text: str) -> None:
    """Say what is routine and no warning: what is reused, what takes a while, where a file went.

    A record of the logger `kt`, which a command prints as one line; in Python `logging.basicConfig(level="INFO")` does.
    """
    import logging

    logging.getLogger("kt").info("%s", text)


INSIDE = ("kt", "contextlib", "functools", "jaxtyping", "beartype", "torch")
"""Packages whose frames lie between a user's line and a warning of ours."""


def warn_user(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called kt, however deep inside kt the reason was found."""
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in INSIDE:
        frame = frame.f_back
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    # The module is kt's own: by it the command line, and a user's filters, know these warnings.
    warnings.warn_explicit(text, category, frame.f_code.co_filename, frame.f_lineno, "kt", registry)
