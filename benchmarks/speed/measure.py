"""What the speed benchmarks share: seconds and peak memory of a call, its floating-point work, the machine's rate.

A row compares `kt`'s own function with the same work written in the plain obvious way, in one process and run, so that
only ratios are read from it. The floor of a row is its counted work at the rate of a large matrix product here.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

T = TypeVar("T")

STATUS = Path("/proc/self/status")


class Cost(NamedTuple):
    """What a call took: CPU and wall seconds, and by how much the process's peak memory grew (MiB)."""

    cpu_s: float
    wall_s: float
    peak_mib: float


class Row(NamedTuple):
    """A line of docs/performance.md.

    `difference` is the largest absolute difference between the two results, `bound` what it may be; `goal` the least
    ratio reference / ours (None: no goal). `counted` is the work of our call in floating-point operations.
    """

    part: str
    work: str
    reference: str
    ours: Cost
    theirs: Cost
    counted: int
    rate: float
    difference: float
    bound: float
    goal: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float:
        return self.theirs.cpu_s / self.ours.cpu_s

    @property
    def over_floor(self) -> float:
        """Our CPU seconds as a multiple of what the counted work takes as one large matrix product."""
        return self.ours.cpu_s / (self.counted / self.rate)

    @property
    def holds(self) -> bool:
        return self.difference <= self.bound and (self.goal is None or self.ratio >= self.goal)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        plain = self._asdict() | {"ours": self.ours._asdict(), "theirs": self.theirs._asdict()}
        return plain | {"ratio": self.ratio, "over_floor": self.over_floor, "holds": self.holds}


def measured(call: Callable[[], T]) -> tuple[T, Cost]:
    """The call's result, and what it took."""
    before = forget_peak()
    cpu, wall = time.process_time(), time.perf_counter()
    result = call()
    return result, Cost(time.process_time() - cpu, time.perf_counter() - wall, peak() - before)


def counted(call: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products (attention included) in a call, as PyTorch dispatches them."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def product_rate(dtype: torch.dtype = torch.float32, size: int = 2048, repeats: int = 5) -> float:
    """Operations a CPU second of a large square matrix product: the best of a few."""
    left, right = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    best = min(measured(lambda: left @ right)[1].cpu_s for _ in range(repeats))
    return 2 * size**3 / best


def command(rows: Callable[[bool], Iterable[Row]], about: str | None) -> int:
    """The command line of a benchmark: its rows as JSON; the exit code is 1 where one misses its goal or its bound."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small model or matrix: seconds")
    made = []
    for row in rows(parser.parse_args().small):
        made.append(row)
        sys.stderr.write(f"{row.work}: {row.ours.cpu_s:.1f} s, {row.reference}: {row.theirs.cpu_s:.1f} s\n")
    sys.stdout.write(json.dumps([row.as_dict() for row in made], indent=2) + "\n")
    return 0 if all(row.holds for row in made) else 1


def peak() -> float:
    """The process's largest resident memory, in MiB: since `forget_peak` where Linux allows that, else so far."""
    if STATUS.exists():
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)


def forget_peak() -> float:
    """Begin to look for the peak anew; what is resident now, in MiB."""
    if not STATUS.exists():
        return peak()
    with suppress(PermissionError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024
