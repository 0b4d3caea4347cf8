"""The kill benchmark's own functions, which the tests share, and waiting for a moment in a command's work."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "reliability"


def load(name: str):
    """A benchmark as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


killing = load("kill")
COMMANDS = {command.name: command for command in killing.COMMANDS}


def wait_for(process, folder, glob, seconds=120.0):
    """Until a file of this pattern is there; the process must not end before."""
    end = time.monotonic() + seconds
    while not any(folder.glob(glob)):
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < end, f"no {glob} in {seconds} s"
        time.sleep(0.005)
