"""Ctrl-C and SIGTERM: their message, and a thread that ends the command within two seconds.

Python sees a signal between two operations only, and one factorisation of a large matrix can take minutes. So a
thread that the signal wakes waits `GRACE` seconds for the orderly end and then ends the process. That loses nothing:
every file is written under a temporary name and renamed when whole.

In a run of several processes the launcher ends all by SIGTERM when one has died; SIGTERM is treated alike there.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress

from ..runs import parallel

GRACE = 1.5
INTERRUPTED = 130
TERMINATED = 143
_NOTHING = "nothing was written"
_note = [_NOTHING]
_ending: list[bool] = []
_told: list[bool] = []
_heard: list[int] = []
"""The signal that ends the command."""
WORDS = {signal.SIGINT: ("interrupted", INTERRUPTED), signal.SIGTERM: ("terminated", TERMINATED)}


def note(what: str = _NOTHING) -> None:
    """Set the message of an interruption from now on: which run can go on, and how."""
    _note[0] = what


def message() -> str:
    return f"kt: {WORDS[_signal()][0]}; {_note[0]}\n"


def code() -> int:
    """The exit code of a command that a signal ends."""
    return WORDS[_signal()][1]


def _signal() -> signal.Signals:
    return signal.Signals(_heard[0]) if _heard else signal.SIGINT


def stopped() -> str:
    """The message where one of several processes is ended from outside."""
    return f"kt: error: another process of this run has ended, or the run was stopped; {_note[0]}\n"


def undisturbed() -> None:
    """Only note SIGTERM from now on, so that one of several processes can finish cleaning up."""
    if parallel.started() > 1 and not _ending and threading.current_thread() is threading.main_thread():
        _ending.append(True)
        signal.signal(signal.SIGTERM, lambda *_: _told.append(True))


def told_to_end(seconds: float) -> bool:
    """Whether SIGTERM has come, or comes within `seconds`."""
    end = time.monotonic() + seconds
    while not _told and time.monotonic() < end:
        time.sleep(0.02)
    return bool(_told)


def hear() -> None:
    """Remember a signal from now on: a library that loads may turn its exception into another, or swallow it."""
    _heard.clear()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell may have it ignored
        signal.signal(signal.SIGINT, _interrupt)
    if parallel.started() == 1:
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, *_: object) -> None:
    if not _heard:  # a second one does not disturb the orderly end
        _heard.append(number)
        raise KeyboardInterrupt


def deaf() -> None:
    """Ignore the signals from now on: all is done, and Python's own end takes a moment."""
    if not _heard and threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if parallel.started() == 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)


def leave(code: int) -> None:
    """End an interrupted process: Python's exit functions run, and its interpreter is not torn down.

    Threads of native libraries may still be at work, and C++ ends a process by SIGABRT where such a thread is torn
    down with the rest.
    """
    if _heard:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def heard() -> bool:
    """Whether a signal ends the command."""
    return bool(_heard)


def end_soon_after_interrupt() -> None:
    """Watch for the signals in a thread of its own, for as long as the process lives."""
    woken, wakes = socket.socketpair()
    wakes.setblocking(False)
    signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(woken, wakes), daemon=True).start()


def _watch(woken: socket.socket, wakes: socket.socket) -> None:
    """End the process soon after a signal; `wakes` is an argument so that it stays open."""
    while data := woken.recv(64):
        if signal.SIGINT in data or (signal.SIGTERM in data and parallel.started() == 1):
            time.sleep(GRACE)
            if not _heard:  # the main thread has not got to it
                _heard.append(signal.SIGINT if signal.SIGINT in data else signal.SIGTERM)
            _end(message(), code())
        if signal.SIGTERM in data and parallel.started() > 1 and not _ending:
            time.sleep(GRACE)
            _end(stopped(), 1)


def _end(message: str, code: int) -> None:
    if parallel.started_as() == 0 or parallel.heir():
        with suppress(OSError):  # nobody may read it any more
            os.write(sys.stderr.fileno(), message.encode())
    os._exit(code)
