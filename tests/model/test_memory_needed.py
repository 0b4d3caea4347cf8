"""What is free, in a container too, and the line that refuses what is not."""

from types import SimpleNamespace

import pytest

from kt.model import memory
from kt.model.memory import NotEnoughMemory, free_memory, require_memory

GIB = 2**30


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=16 * GIB))


def test_without_a_limit_it_is_what_the_machine_has(tmp_path):
    assert free_memory(tmp_path) == 16 * GIB
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text(f"{GIB}\n")
    assert free_memory(tmp_path) == 16 * GIB


def test_a_containers_limit_counts_and_its_file_pages_do_not(tmp_path):
    (tmp_path / "memory.max").write_text(f"{4 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{3 * GIB}\n")
    assert free_memory(tmp_path) == GIB
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {GIB}\n")
    assert free_memory(tmp_path) == 2 * GIB


def test_the_older_files_are_read_too(tmp_path):
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(str(2 * GIB))
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text(str(5 * GIB))
    assert free_memory(tmp_path) == 0


def test_what_does_not_fit_is_one_line_with_both_figures(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 3 * GIB)
    require_memory(3 * GIB, "it", "x")
    with pytest.raises(NotEnoughMemory, match=r"^AlphaEdit's projector needs 11.5 GiB, but 3.0 GiB .* are free; wait$"):
        require_memory(int(11.5 * GIB), "AlphaEdit's projector", "wait")
    assert NotEnoughMemory.exit_code == 2


def test_the_limit_of_the_processs_own_group_counts_and_that_of_those_above(tmp_path):
    own = tmp_path / "own"
    own.write_text("0::/slice/job\n")
    for folder, limit in ((tmp_path / "slice", 6), (tmp_path / "slice" / "job", 9)):
        folder.mkdir()
        (folder / "memory.max").write_text(f"{limit * GIB}\n")
        (folder / "memory.current").write_text(f"{GIB}\n")
    assert free_memory(tmp_path, own) == 5 * GIB
    assert free_memory(tmp_path, tmp_path / "absent") == 16 * GIB
