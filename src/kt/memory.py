"""How much memory a process may still take, and refusing what would not fit before any work is done."""

from __future__ import annotations

from pathlib import Path

import psutil

from .errors import KtError

CGROUP = Path("/sys/fs/cgroup")


class NotEnoughMemory(KtError):
    """What was asked for would not fit: take a smaller piece, or a machine with more."""


def free_memory(cgroup: Path = CGROUP) -> int:
    """Bytes: what the machine has left, or the container, where that is less.

    A container's limit (cgroup v2 or v1) is not in what the machine reports; file pages that count as used there are
    given back by the kernel when memory runs short.
    """
    free = int(psutil.virtual_memory().available)
    for limit, used, folder in (
        ("memory.max", "memory.current", cgroup),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", cgroup / "memory"),
    ):
        most, taken = _number(folder / limit), _number(folder / used)
        if most is not None and taken is not None:
            free = min(free, most - taken + _given_back(folder / "memory.stat"))
    return max(free, 0)


def require_memory(needed: int, what: str, advice: str) -> None:
    """
    Raises:
        NotEnoughMemory: fewer bytes are free; the line holds both figures.
    """
    free = free_memory()
    if needed > free:
        raise NotEnoughMemory(f"{what} needs {gib(needed)}, but {gib(free)} of memory are free; {advice}")


def gib(n: int) -> str:
    return f"{n / 2**30:.1f} GiB"


def _number(path: Path) -> int | None:
    """A file's number; None where there is no such file, or it says `max`."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _given_back(stat: Path) -> int:
    try:
        lines = dict(line.split() for line in stat.read_text().splitlines() if len(line.split()) == 2)
    except OSError:
        return 0
    return int(lines.get("inactive_file", lines.get("total_inactive_file", 0)))
