"""Ctrl-C: what is said of it, and that it ends the command within two seconds.

Python sees a signal between two operations only, and one factorisation of a large matrix can take minutes. So a
thread that the signal wakes waits `GRACE` seconds for the orderly end and then ends the process. That loses nothing:
every file is written under a temporary name and renamed when whole.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time

GRACE = 1.5
INTERRUPTED = 130
_NOTHING = "nothing was written"
_note = [_NOTHING]


def note(what: str = _NOTHING) -> None:
    """What is to be said of an interruption from now on: which run can go on, and how."""
    _note[0] = what


def message() -> str:
    return f"kt: interrupted; {_note[0]}\n"


def end_soon_after_interrupt() -> None:
    """Watch for SIGINT in a thread of its own, for as long as the process lives."""
    woken, wakes = socket.socketpair()
    wakes.setblocking(False)
    signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(woken, wakes), daemon=True).start()


def _watch(woken: socket.socket, wakes: socket.socket) -> None:
    """`wakes` is held here so that it is not closed."""
    while data := woken.recv(64):
        if signal.SIGINT in data:
            time.sleep(GRACE)
            os.write(sys.stderr.fileno(), message().encode())
            os._exit(INTERRUPTED)
