"""The benchmarks of speed do their work, and each finds what the plain way finds."""

import subprocess
import sys
from pathlib import Path

import pytest

SPEED = Path(__file__).parents[1] / "benchmarks" / "speed"
sys.path.insert(0, str(SPEED))

from suite import PARTS  # noqa: E402


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_suite_finds_what_the_plain_way_finds(part):
    command = [sys.executable, str(SPEED / "suite.py"), "--small", "--only", part]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") > 2
