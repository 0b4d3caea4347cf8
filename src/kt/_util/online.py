"""Whether the Hugging Face Hub can be asked, found out in seconds; and a bound on how long an answer may take."""

from __future__ import annotations

import http.client
import os
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import TypeVar

from ..errors import BadFile

T = TypeVar("T")

ANSWERS_WITHIN = 5.0
"""Seconds that the Hub has to answer before only what is cached is looked at."""


def unreachable() -> str | None:
    """Why the Hub cannot be asked, in words; None where it answers."""
    if told_offline():
        return "HF_HUB_OFFLINE is set"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return None if answers(endpoint) else f"{endpoint} does not answer"


def told_offline() -> bool:
    """Whether the environment says so."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


ELSEWHERE = "connect, or download it elsewhere and give the file"


def refuse_unreachable(source: str) -> None:
    """Refuse a data set of the Hub where that does not answer: `datasets` would try for a minute.

    Raises:
        BadFile: it does not.
    """
    if not told_offline() and (why := unreachable()):
        raise BadFile(f"cannot read {source}: {why}; {ELSEWHERE}")


def answers(endpoint: str, seconds: float = ANSWERS_WITHIN) -> bool:
    """Whether a server answers at all, through whatever proxy is set."""

    def ask() -> bool:
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=seconds).close()
        except urllib.error.HTTPError:
            pass  # an answer too
        except (OSError, ValueError, http.client.HTTPException) as error:
            return isinstance(getattr(error, "reason", error), ssl.SSLError)  # others may know its certificate
        return True

    try:
        return within(seconds, ask)
    except TimeoutError:
        return False


def within(seconds: float, ask: Callable[[], T]) -> T:
    """The result of `ask`, which bounds its own waiting only in part: a socket's time-out begins anew with each byte,
    and looking up a name heeds none. Where it takes longer, its thread is left to end by itself.

    Raises:
        TimeoutError: it has not ended within `seconds`.
        Exception: what `ask` raised.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(ask())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no whole reply within {seconds:g} s")
    return results[0]
