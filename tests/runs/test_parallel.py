"""Work shared by processes: without a launcher a plain call, under torchrun the same results in all."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kt.runs import parallel


def two(script, *arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, Path(__file__).with_name(script), *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)


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
    run = two("two_processes.py")
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_leaves_a_line_that_says_how_to_go_on(tmp_path, rank):
    """As the kernel does it where memory is short; of rank 0, the other process speaks in its place."""
    arguments = ("heatmap", "--limit", "3", "--samples", "1", "--kind", "mlp", "-o", tmp_path / "run")
    run = two("killed_process.py", rank, int(signal.SIGKILL), *arguments)
    lines = [line for line in run.stderr.splitlines() if line.startswith("kt: error: ")]
    assert run.returncode != 0 and len(lines) == 1, run.stderr[-3000:]
    assert lines[0].endswith(f"go on with --resume {tmp_path / 'run'}")
