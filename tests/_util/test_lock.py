"""Locks: one holder at a time, free again when the holder lets go or dies."""

import subprocess
import sys
import threading
import warnings

import pytest

from kt._util.lock import FolderLock, abandoned, default_cache, exclusive

HOLD = "import sys, pathlib, kt._util.lock as l; {}; print('ready', flush=True); sys.stdin.read()"


@pytest.fixture
def holding():
    """Another process that runs a line of code and then waits."""
    started = []

    def start(line, path):
        code = HOLD.format(line.format(f"pathlib.Path({str(path)!r})"))
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == b"ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_folder_has_one_holder_and_nothing_is_left_in_it(tmp_path):
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    assert (first.held, first.taken, second.held, second.taken) == (True, False, False, True)
    second.release()
    assert not abandoned(tmp_path)
    first.release()
    first.release()
    assert abandoned(tmp_path) and not any(tmp_path.iterdir())


def test_a_killed_process_holds_its_folder_no_longer(tmp_path, holding):
    process = holding("lock = l.FolderLock({})", tmp_path)
    assert not abandoned(tmp_path)
    process.kill()
    process.wait()
    assert abandoned(tmp_path)


def test_a_folder_keeps_its_lock_when_it_is_renamed(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    lock = FolderLock(folder)
    folder.rename(tmp_path / "b")
    assert not abandoned(tmp_path / "b")
    lock.release()
    assert abandoned(tmp_path / "b")


def test_without_flock_no_folder_is_taken_and_none_counts_as_abandoned(tmp_path, monkeypatch):
    monkeypatch.setattr("kt._util.lock.fcntl", None)
    lock = FolderLock(tmp_path)
    assert not lock.held and not lock.taken and not abandoned(tmp_path)


def test_a_second_process_says_that_it_waits_and_then_works(tmp_path, holding):
    path = tmp_path / "a.lock"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with exclusive(path, "scores this"):
            pass
    process = holding("lock = l.exclusive({}, 'x'); lock.__enter__()", path)
    with pytest.warns(UserWarning, match="another process scores this; waiting for it"):
        threading.Timer(0.3, process.kill).start()
        with exclusive(path, "scores this"):
            assert process.wait() != 0


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.delenv("KT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "kt"
    monkeypatch.setenv("KT_CACHE", str(tmp_path / "mine"))
    assert default_cache() == tmp_path / "mine"
