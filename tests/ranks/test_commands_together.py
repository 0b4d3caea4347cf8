"""Commands of kt under torchrun: one result and one voice, whatever happens to one of the processes."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
from ranks_help import kt, launched

from kt.cli import main

TRACE = ["heatmap", "--limit", "5", "--samples", "2", "--kind", "mlp", "--batch-size", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run folder of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert main([*TRACE, "--out", str(folder), "--quiet"]) == 0
    return folder


def ours(text: str) -> list[str]:
    """The lines of kt among those of torchrun."""
    return [line for line in text.splitlines() if line.startswith("kt:")]


def wait_for(folder: Path, pattern: str, process) -> None:
    end = time.monotonic() + 100
    while not any(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def ranks_of(process) -> dict[str, int]:
    """Process ids by rank."""
    workers = psutil.Process(process.pid).children(recursive=True)
    return {rank: worker.pid for worker in workers if (rank := worker.environ().get("RANK")) is not None}


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_two_processes_write_and_say_what_one_does(alone, tmp_path):
    found = kt(2, *TRACE, "--out", tmp_path / "run", "--html", tmp_path / "x.html", "--json", "-")
    assert found.returncode == 0, found.stderr
    assert left_in(tmp_path) == ["run", "x.html"]
    assert (tmp_path / "run" / "arrays.safetensors").read_bytes() == (alone / "arrays.safetensors").read_bytes()
    assert (tmp_path / "run" / "figures.html").exists()
    said = json.loads(found.stdout)  # once: two would be no JSON
    results, manifest = (
        json.loads((tmp_path / "run" / f"{name}.json").read_text()) for name in ("results", "manifest")
    )
    assert said["kinds"] == results["kinds"] == json.loads((alone / "results.json").read_text())["kinds"]
    assert manifest["processes"] == 2
    assert [line for line in ours(found.stderr) if "written to" in line] == [f"kt: written to {tmp_path / 'run'}"]


@pytest.mark.parametrize("rank", ["1", pytest.param("0", marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_run_and_one_process_goes_on_with_it(rank, alone, tmp_path):
    process = launched(2, *TRACE, "--out", tmp_path / "run")
    wait_for(tmp_path / "run.unfinished" / "phases", "*.safetensors", process)
    os.kill(ranks_of(process)[rank], signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode != 0
    if rank == "1":  # rank 0 cleans up and says how to go on
        assert left_in(tmp_path) == ["run.unfinished"]
        (line,) = ours(err)
        assert line.endswith(f"what was finished is kept: go on with --resume {tmp_path / 'run'}")
    assert main([*TRACE, "--resume", str(tmp_path / "run"), "--quiet"]) == 0
    assert left_in(tmp_path) == ["run"]
    assert (tmp_path / "run" / "arrays.safetensors").read_bytes() == (alone / "arrays.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_that_one_process_began_two_go_on_with_to_the_same_bytes(alone, tmp_path):
    process = launched(1, *TRACE, "--out", tmp_path / "run")
    wait_for(tmp_path / "run.unfinished" / "phases", "*.safetensors", process)
    process.kill()
    process.communicate(timeout=30)
    found = kt(2, *TRACE, "--resume", tmp_path / "run")
    assert found.returncode == 0, found.stderr
    assert re.search(r"kt: \d+ finished phases are taken from", found.stderr)
    assert left_in(tmp_path) == ["run"]
    assert (tmp_path / "run" / "arrays.safetensors").read_bytes() == (alone / "arrays.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_launcher_leaves_nothing_but_the_journal(how, tmp_path):
    process = launched(2, *TRACE, "--out", tmp_path / "run")
    wait_for(tmp_path / "run.unfinished" / "phases", "*.safetensors", process)
    process.send_signal(how)
    _, err = process.communicate(timeout=30)
    assert process.returncode != 0
    assert left_in(tmp_path) == ["run.unfinished"]
    assert [line for line in ours(err) if "--resume" in line] == ours(err)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--facts", "nowhere.jsonl"], "nowhere.jsonl"),
        pytest.param(["--device-map", "auto"], "--device-map spreads one model", marks=pytest.mark.slow),
        pytest.param(["--metric", "nonsense"], "nonsense", marks=pytest.mark.slow),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, says, tmp_path):
    found = kt(2, *TRACE, *arguments, "--out", tmp_path / "run")
    (line,) = ours(found.stderr)
    assert says in line
    assert re.search(r"exitcode\s*: 2", found.stderr)
    assert left_in(tmp_path) == []


def test_what_is_not_shared_rank_0_does_and_the_others_are_quiet(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for arguments in (["ls", "methods"], ["heatmap", "--help"], ["--version"], ["report", "nowhere"]):
        assert main(arguments) == 0
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    assert main(["ls", "methods"]) == 0
    assert "intattn" in capsys.readouterr().out


SHARED = {
    "alpha": ["--limit", "3", "--samples", "2"],
    "probe": ["--limit", "4", "--batch-size", "2"],
    "cov": ["--max-tokens", "6000", "--cache", "PLACE", "--layers-attn", "none"],
    "apply-edit": ["--limit", "3", "--method", "memit", "--set", "v_num_grad_steps=4", "--max-tokens", "4000",
                   "--evaluate", "end", "--no-generate", "--merge-to", "PLACE"],
    "eval": ["--limit", "1", "--no-cache"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", SHARED)
def test_two_processes_find_the_numbers_that_one_does(command, tmp_path, monkeypatch):
    monkeypatch.setenv("KT_CACHE", str(tmp_path / "cache"))
    results = []
    for n in (1, 2):
        given = [str(tmp_path / f"place-{n}") if argument == "PLACE" else argument for argument in SHARED[command]]
        found = kt(n, command, *given, "--out", tmp_path / f"run-{n}", "--device", "cpu", "--json", "-")
        assert found.returncode == 0, found.stderr
        results.append(flat(json.loads(found.stdout)))
    first, second = results
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value == pytest.approx(second[name], rel=1e-3, abs=1e-5), name
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} <= {"cache", "place", "run"}


def flat(value, name="") -> dict[str, float]:
    """The numbers of a result by their place."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{name}.{key}").items()}
    if isinstance(value, list):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{name}.{i}").items()}
    return {name: value} if isinstance(value, int | float) and not isinstance(value, bool) else {}
