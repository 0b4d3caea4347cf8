"""Programs in several processes: bare ones with the launcher's environment, and commands of kt under torchrun."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

QUIET = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
LAUNCH = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node"]


def together(code: str, n: int = 2, timeout: float = 60, **environment: str) -> list[tuple[int, str, str]]:
    """The same program in `n` processes, as torchrun would start them: exit code, stdout and stderr of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | QUIET | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(n)
    ]
    try:
        said = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


def launched(n: int, *arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    """`kt` under torchrun, in the current folder, on its own; `n` is 1 for kt without a launcher."""
    launcher = [*LAUNCH, str(n), "-m", "kt"] if n > 1 else ["kt"]
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, *map(str, arguments)],
        env=os.environ | QUIET | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kt(n: int, *arguments: str | Path, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same, until it ends."""
    process = launched(n, *arguments, **environment)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
