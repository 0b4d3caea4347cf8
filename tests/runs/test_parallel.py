"""Work shared by processes: without a launcher a plain call, under torchrun the same results in all."""

import subprocess
import sys
from pathlib import Path

import pytest

from kt.runs import parallel


def test_without_a_launcher_the_work_is_a_plain_call():
    done = []
    assert parallel.on_rank_zero("one", lambda a, b: a + b, 1, 2) == 3
    assert parallel.map_over_ranks("many", [1, 2], lambda part: -part, done.append) == [-1, -2]
    assert done == [1, 2]
    assert parallel.all_gather("value", "x") == ["x"]
    assert (parallel.count(), parallel.is_main(), parallel.local()) == (1, True, 0)
    with pytest.raises(ZeroDivisionError):
        parallel.on_rank_zero("error", lambda: 1 / 0)


def test_two_processes_share_parts_results_and_errors():
    script = Path(__file__).with_name("two_processes.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    run = subprocess.run(launcher, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
