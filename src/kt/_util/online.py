"""Whether the Hugging Face Hub can be asked, found out in seconds."""

from __future__ import annotations

import os
import ssl
import threading
import urllib.error
import urllib.request

from ..errors import BadFile

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
    heard: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=seconds).close()
        except urllib.error.HTTPError:
            pass  # an answer too
        except (OSError, ValueError) as error:
            if not isinstance(getattr(error, "reason", error), ssl.SSLError):  # others may know its certificate
                return
        heard.append(True)

    thread = threading.Thread(target=ask, daemon=True)  # looking up a name heeds no timeout
    thread.start()
    thread.join(seconds)
    return bool(heard)
