"""A command that is killed, interrupted or out of disk leaves whole files or none, and goes on to the same bytes.

Fifty kills at random moments: benchmarks/reliability/kill.py. Here one a command, in the midst of its work.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from reliability_help import COMMANDS, killing, wait_for

MIDST = {
    "cov": "cache/*.lock",
    "apply-edit": "run.unfinished/phases/*targets*.safetensors",
    "heatmap": "run.unfinished/phases/*.safetensors",
    "export": "merged.tmp-*/*",
}
"""A file that is there once the work itself is under way."""


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """What a shell starts in the background ignores SIGINT, and so would the commands that are started here."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """The results of uninterrupted runs, and an edit to export."""
    found, edit = {}, None
    for name, command in COMMANDS.items():
        place = tmp_path_factory.mktemp("whole") / name
        killing.prepare(place, command, edit)
        code, said = killing.finish(killing.start(place, command.arguments))
        assert code == 0, said
        found[name] = killing.results(place, command)
        assert found[name]
        if name == "apply-edit":
            edit = place / "run" / "edit.safetensors"
    return found, edit


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_goes_on_to_the_same_bytes(name, references, tmp_path):
    whole, edit = references
    command, place = COMMANDS[name], tmp_path / "killed"
    killing.prepare(place, command, edit)
    process = killing.start(place, command.arguments)
    wait_for(process, place, MIDST[name])
    assert killing.kill(process)
    assert killing.half_written(place) == ()
    if command.resumes:
        assert not (place / "run").exists()
    code, said = killing.go_on(place, command)
    assert code == 0, said
    assert killing.results(place, command) == whole[name]
    assert [p.name for p in place.iterdir() if ".tmp-" in p.name or p.name.endswith(".unfinished")] == []


def test_what_is_half_written_is_seen(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text('{"files": ["edit.safetensors"]}')
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (tmp_path / "cut.json").write_text("{")
    (tmp_path / "run.tmp-01234567").mkdir()
    (tmp_path / "run.tmp-01234567" / "cut.json").write_text("{")
    assert len(killing.half_written(tmp_path)) == 3


@pytest.mark.parametrize(
    ("name", "number", "exit_code"),
    [("apply-edit", signal.SIGINT, 130), ("heatmap", signal.SIGINT, 130), ("apply-edit", signal.SIGTERM, 143)],
)
def test_a_signal_ends_within_two_seconds_and_leaves_a_run_that_goes_on(name, number, exit_code, references, tmp_path):
    command, place = COMMANDS[name], tmp_path / "cut"
    killing.prepare(place, command, None)
    process = killing.start(place, command.arguments)
    wait_for(process, place, MIDST[name])
    began = time.monotonic()
    os.killpg(process.pid, number)
    code, said = killing.finish(process)
    assert time.monotonic() - began < 2
    assert code == exit_code and said.count("--resume run") == 1, said
    assert "Traceback" not in said
    assert sorted(p.name for p in place.iterdir()) == ["cache", "run.unfinished"][name == "heatmap" :]
    code, said = killing.go_on(place, command)
    assert code == 0, said
    assert killing.results(place, command) == references[0][name]


EARLY = """
import os, signal, sys
class Interrupts:
    def find_spec(self, name, *_):
        if name == "kt.cli.app":
            os.kill(os.getpid(), signal.SIGNAL)
sys.meta_path.insert(0, Interrupts())
"""
LOADING = """
import os, signal, sys
import kt.cli.session
from kt.errors import UnknownModel
def load(options):
    try:
        os.kill(os.getpid(), signal.SIGNAL)
        os.getpid()
    except KeyboardInterrupt:
        raise UnknownModel("cannot load model")  # as libraries do
kt.cli.session.load_model = load
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("moment", [EARLY, LOADING], ids=["at the start", "while a model loads"])
def test_a_signal_is_one_line_and_its_exit_code_at_any_moment(moment, number, tmp_path):
    moment = moment.replace("signal.SIGNAL", f"signal.{number}")
    word, code = {"SIGINT": ("interrupted", 130), "SIGTERM": ("terminated", 143)}[number]
    script = f"{moment}\nfrom kt.cli import main\nsys.argv = ['kt', 'heatmap', '--limit', '1']\nsys.exit(main())\n"
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (code, "", f"kt: {word}; nothing was written\n")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_also_a_factorisation_that_takes_long():
    """Python would see the signal after it."""
    script = (
        "import torch, time\n"
        "from kt.cli import interrupt\n"
        "torch.set_num_threads(1)\n"
        "matrix = torch.rand(3500, 3500, dtype=torch.float64)\n"
        "interrupt.end_soon_after_interrupt()\n"
        "print('ready', flush=True)\n"
        "torch.linalg.eigvals(matrix)\n"
        "print('done', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    assert 1.0 < time.monotonic() - began < 2.5
    assert process.stdout.read() == b"" and process.stderr.read() == b"kt: interrupted; nothing was written\n"


def test_a_full_disk_is_one_line_and_leaves_finished_phases_only(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    inside = (
        f"mount -t tmpfs -o size=64k tmpfs {place} && "
        f"{sys.executable} -m kt apply-edit --limit 2 --alpha 0.3 --max-tokens 2000 --set v_num_grad_steps=2 "
        f"--quiet -o {place}/run; echo code $?; find {place} -type f"
    )
    found = in_namespace(inside, tmp_path)
    lines = found.stderr.strip().splitlines()
    code, status, *left = found.stdout.split()
    assert (code, status) == ("code", "2"), found
    assert len(lines) == 1 and "the disk is full" in lines[0] and ".tmp-" not in lines[0], lines
    assert f"--resume {place}/run" in lines[0]
    assert left and all(name.startswith(f"{place}/run.unfinished/") and ".tmp-" not in name for name in left), left


def test_a_read_only_output_is_refused_before_the_model_loads(tmp_path):
    place = tmp_path / "fixed"
    place.mkdir()
    command = f"{sys.executable} -X importtime -m kt heatmap --limit 2 -o {place}/run"
    inside = f"mount -t tmpfs -o ro tmpfs {place} && {command}; echo code $?"
    found = in_namespace(inside, tmp_path)
    said = [line for line in found.stderr.splitlines() if not line.startswith("import time:")]
    assert found.stdout.split() == ["code", "2"] and len(said) == 1 and "read-only" in said[0], said
    assert not any(line.endswith(" torch") for line in found.stderr.splitlines())


def in_namespace(script, home):
    """A shell that may mount, for itself alone."""
    shell = ["unshare", "-rm", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*shell, f"mount -t tmpfs t {home}"], check=False).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    environment = os.environ | {"KT_CACHE": str(home / "cache"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([*shell, script], capture_output=True, text=True, env=environment, check=False, timeout=300)


def test_two_processes_that_share_a_cache_take_turns(tmp_path):
    cov = COMMANDS["cov"].arguments
    both = [killing.start(tmp_path, (*cov[:-1], f"run{i}")) for i in range(2)]
    said = [killing.finish(process) for process in both]
    assert [code for code, _ in said] == [0, 0], said
    files = sorted((tmp_path / "cache").glob("cov-*.safetensors"))
    assert files and killing.half_written(tmp_path) == ()
    assert not list((tmp_path / "cache").glob("partial-*"))
