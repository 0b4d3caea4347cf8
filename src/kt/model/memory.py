"""Whether a large array fits before it is allocated: a process that takes too much is killed without a word.

The machine's free memory is not all that counts. A container or a batch system limits a group of processes (a cgroup)
below what the machine has, and the kernel kills the process at that limit.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil

from ..errors import KtError
from ..runs import parallel as ranks

if TYPE_CHECKING:
    import torch


GROUPS = Path("/sys/fs/cgroup")
"""Where Linux shows the limits of groups of processes."""

OWN_GROUP = Path("/proc/self/cgroup")
"""Where Linux names the groups that this process belongs to."""


class NotEnoughMemory(KtError):
    """The work would take more memory than is free."""

    passing = True


class _Names(NamedTuple):
    """The files of a group in one version of cgroups; `given_back` is the cache that the kernel frees when asked."""

    limit: str
    used: str
    given_back: str


_VERSION_2 = _Names("memory.max", "memory.current", "inactive_file")
_VERSION_1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def require_memory(needed: int, what: str, advice: str) -> None:
    """Refuse work that needs more bytes than are free, before it has begun."""
    free = free_memory()
    if needed <= free:
        return
    # As many decimals as it takes for the two to differ.
    digits = next(d for d in range(1, 11) if gib(needed, d) != gib(free, d))
    message = f"{what} needs {gib(needed, digits)}, but {gib(free, digits)} of memory are free; {advice}"
    raise NotEnoughMemory(" ".join(message.split()))


def free_memory(groups: Path = GROUPS, own_group: Path = OWN_GROUP) -> int:
    """Bytes that this process may still take: what the machine has left, or its group if that is less.

    Of several processes on the machine that are at the same work, each may take its share.
    """
    rooms = [_room(folder, names) for folder, names in _limiting(groups, own_group)]
    free = min([psutil.virtual_memory().available, *(room for room in rooms if room is not None)])
    return max(0, free) // ranks.beside()


def free_on(device: torch.device) -> int:
    """Bytes that this process may still take where a model is: of a GPU also what PyTorch holds and does not use."""
    if device.type != "cuda":
        return free_memory()
    import torch

    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def gib(n: int, digits: int = 1) -> str:
    """`11.5 GiB`."""
    return f"{n / 2**30:,.{digits}f} GiB"


def _limiting(groups: Path, own_group: Path) -> list[tuple[Path, _Names]]:
    """The process's group and all above it, since each of them limits it; the root alone where none is named."""
    found = []
    for line in [*_lines(own_group), "0::/", "0:memory:/"]:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        top, names = (groups / "memory", _VERSION_1) if controllers else (groups, _VERSION_2)
        # A container may see its own group as the root while the name is still that of the machine: those that are
        # not there say nothing.
        below = [part for part in path.split("/") if part not in ("", ".", "..")]
        found += [(top.joinpath(*below[:depth]), names) for depth in range(len(below) + 1)]
    return list(dict.fromkeys(found))


def _room(folder: Path, names: _Names) -> int | None:
    """Bytes below the group's limit; None where it has none."""
    limit, used = _number(folder / names.limit), _number(folder / names.used)
    if limit is None:
        return None
    fields = [line.split() for line in _lines(folder / "memory.stat")]
    cache = sum(int(field[1]) for field in fields if field[0] == names.given_back)
    return limit - (used or 0) + cache


def _number(file: Path) -> int | None:
    """The number that the file holds; None for `max` or no file."""
    text = "".join(_lines(file)).strip()
    return int(text) if text.isdigit() else None


def _lines(file: Path) -> list[str]:
    """The file's lines; none where it cannot be read, as on a system without groups."""
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
