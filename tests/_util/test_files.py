"""Files are whole or absent."""

from __future__ import annotations

import errno
import json
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from kt._util import files as artifacts
from kt._util.data import load_arrays, read_json, read_toml, save_arrays, to_json, write_json
from kt._util.files import NotWritable, atomic_write, check_writable, write_named
from kt.errors import BadFile
from kt.export.shards import refuse_taken, whole_folder
from kt.model.finding import read_layout
from kt.presets import read_preset
from kt.recipes import read_recipe
from kt.runs.folder import RunFolder, default_folder, is_run, read_run


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_atomic_write_replaces_the_whole_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    atomic_write(path, "old")
    atomic_write(path, b"new")
    atomic_write(tmp_path / "b.txt", lambda temporary: temporary.write_text("by hand"))
    assert path.read_text() == "new"
    assert listing(tmp_path) == ["b.txt", "deep", "deep/a.txt"]


def test_a_failed_write_keeps_the_old_file_and_removes_the_temporary_one(tmp_path):
    path = atomic_write(tmp_path / "a.txt", "old")

    def fails(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, fails)
    assert path.read_text() == "old"
    assert listing(tmp_path) == ["a.txt"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NotWritable, match=r"a\.txt: the disk is full") as caught:
        atomic_write(tmp_path / "a.txt", "text")
    assert "\n" not in str(caught.value)
    assert listing(tmp_path) == []


def test_a_device_is_written_through_and_never_replaced():
    with pytest.raises(NotWritable, match="the disk is full"):
        atomic_write("/dev/full", "text")
    atomic_write("/dev/null", "text")
    assert Path("/dev/full").is_char_device()
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("place", ["file/below.txt", "folder", "/proc/kt.txt"])
def test_a_place_that_cannot_be_written_is_refused_in_one_line(tmp_path, place):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(NotWritable, match="cannot write") as caught:
        atomic_write(tmp_path / place, "text")
    assert "\n" not in str(caught.value)
    assert listing(tmp_path) == ["file", "folder"]


def test_json_has_null_for_nan_and_equal_bytes_for_equal_values(tmp_path):
    value = {"b": np.float32("nan"), "a": np.arange(2), "c": (1, np.int64(2)), "d": float("inf"), "e": {1: Path("x")}}
    text = to_json(value)
    assert json.loads(text) == {"a": [0, 1], "b": None, "c": [1, 2], "d": None, "e": {"1": "x"}}
    assert text == to_json(dict(reversed(value.items())))
    path = write_json(tmp_path / "a.json", {"x": 1})
    assert read_json(path) == {"schema_version": 1, "x": 1}


@pytest.mark.parametrize(
    ("content", "says"), [("{\n 'x': 1}", "line 2"), ("[1]", "list"), ("", "line 1"), ("\udcff", "not a text file")]
)
def test_a_broken_json_file_is_one_line(tmp_path, content, says):
    path = tmp_path / "a.json"
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(BadFile, match=says) as caught:
        read_json(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_arrays_and_metadata_come_back_and_the_same_bytes_each_time(tmp_path):
    arrays = {"x": np.arange(6.0).reshape(2, 3), "y": np.array([1, 2])}
    first = save_arrays(tmp_path / "a.safetensors", arrays, {"kind": "trace", "b": float("nan"), "a": [1]})
    second = save_arrays(tmp_path / "b.safetensors", arrays, {"a": [1], "b": None, "kind": "trace"})
    loaded, metadata = load_arrays(first, kind="trace")
    assert metadata == {"schema_version": 1, "kind": "trace", "b": None, "a": [1]}
    assert all(np.array_equal(loaded[name], arrays[name]) for name in arrays)
    assert first.read_bytes() == second.read_bytes()


def test_tensors_keep_their_dtype(tmp_path):
    path = save_arrays(tmp_path / "a.safetensors", {"x": torch.ones(2, dtype=torch.bfloat16).t()})
    loaded, _ = load_arrays(path, framework="pt")
    assert loaded["x"].dtype == torch.bfloat16


def test_truncated_foreign_and_missing_array_files_are_one_line(tmp_path):
    whole = save_arrays(tmp_path / "a.safetensors", {"x": np.ones(100)}, {"kind": "trace"})
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-9])
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"PK\x03\x04 something else")
    empty = tmp_path / "empty.safetensors"
    empty.write_bytes(b"")
    for path in (cut, other, empty, tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(BadFile) as caught:
            load_arrays(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadFile, match="holds trace, expected edit"):
        load_arrays(whole, kind="edit")


def test_a_run_folder_holds_manifest_results_and_arrays(tmp_path):
    data = tmp_path / "facts.json"
    data.write_text("[]")
    with RunFolder(tmp_path / "run", "alpha", argv=["alpha", "--seed", "1"]) as run:
        run.describe_data(str(data), n=0)
        run.manifest["seed"] = 1
        run.results = {"alpha": 0.5}
        run.arrays = {"x": np.ones(2)}
        run.file("note.txt").write_text("x")
    assert listing(tmp_path / "run") == ["arrays.safetensors", "manifest.json", "note.txt", "results.json"]
    manifest, results = read_run(tmp_path / "run")
    assert results["alpha"] == 0.5
    assert manifest["command_line"] == ["kt", "alpha", "--seed", "1"]
    assert manifest["data"]["sha256"] == artifacts.sha256_file(data)
    assert manifest["files"] == ["arrays.safetensors", "note.txt", "results.json"]
    assert manifest["peak_memory_bytes"]["host"] > 1e6
    assert {"versions", "start", "duration_seconds", "schema_version"} <= set(manifest)


def test_a_failed_run_leaves_nothing_not_even_the_parent_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt), RunFolder(tmp_path / "runs" / "x" / "run", "alpha") as run:
        run.file("half.txt").write_text("x")
        raise KeyboardInterrupt
    assert listing(tmp_path) == []


def test_a_run_replaces_a_run_only_when_it_is_complete(tmp_path, caplog):
    with RunFolder(tmp_path / "run", "alpha") as run:
        run.results = {"alpha": 1}
    with pytest.raises(ValueError), RunFolder(tmp_path / "run", "alpha", overwrite=True):
        raise ValueError
    assert listing(tmp_path) == ["run", "run/manifest.json", "run/results.json"]
    with caplog.at_level("INFO", "kt"), RunFolder(tmp_path / "run", "alpha", overwrite=True) as run:
        run.results = {"alpha": 2}
    assert re.search(r"is .*run\.replaced-1 now", caplog.text)
    assert read_run(tmp_path / "run")[1]["alpha"] == 2
    assert read_run(tmp_path / "run.replaced-1")[1]["alpha"] == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_a_run_is_not_replaced_unasked(tmp_path):
    with RunFolder(tmp_path / "run", "alpha") as run:
        run.results = {"alpha": 1}
    with pytest.raises(NotWritable, match="--overwrite"), RunFolder(tmp_path / "run", "alpha"):
        raise AssertionError
    with RunFolder(tmp_path / "run", "alpha", keep=False):  # a dry run
        pass
    with (
        pytest.warns(UserWarning, match="run-2"),
        RunFolder(tmp_path / "new" / "run", "alpha") as late,
        RunFolder(tmp_path / "new" / "run", "alpha"),
    ):
        late.results = {"alpha": 2}
    assert late.path == tmp_path / "new" / "run-2" and read_run(late.path)[1]["alpha"] == 2


def test_a_run_that_goes_on_replaces_its_earlier_state_but_never_an_edit(tmp_path, caplog):
    caplog.set_level("INFO", "kt")
    for name in ("points", "edited"):
        with RunFolder(tmp_path / name, "sweep") as run:
            run.file("edit.safetensors" if name == "edited" else "points.json").write_text("x")
        caplog.clear()
        with RunFolder(tmp_path / name, "sweep", continues=True):
            pass
        assert len(caplog.records) == (name == "edited")
    assert (tmp_path / "edited.replaced-1" / "edit.safetensors").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["edited", "edited.replaced-1", "points"]


def test_a_failure_while_finishing_leaves_the_previous_run(tmp_path):
    with RunFolder(tmp_path / "run", "alpha") as run:
        run.results = {"alpha": 1}
    with (
        pytest.raises(NotWritable, match=r"run/arrays\.safetensors"),
        RunFolder(tmp_path / "run", "alpha", overwrite=True) as run,
    ):
        run.results = {"alpha": 2}
        run.arrays = {"x": object()}
    assert read_run(tmp_path / "run")[1]["alpha"] == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_other_folders_and_files_are_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file", "file/below"):
        with pytest.raises(NotWritable), RunFolder(tmp_path / name, "alpha"):
            raise AssertionError
    assert listing(tmp_path) == ["file", "mine", "mine/thesis.txt"]
    assert not is_run(tmp_path / "mine")
    with pytest.raises(BadFile, match="not a run folder"):
        read_run(tmp_path / "mine")


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "run").mkdir()
    with RunFolder(tmp_path / "run", "alpha"):
        pass
    assert is_run(tmp_path / "run")


def test_runs_of_one_second_get_different_folders(tmp_path):
    first = default_folder("alpha", "org/Model B@v1", root=tmp_path)
    first.mkdir()
    second = default_folder("alpha", "org/Model B@v1", root=tmp_path)
    assert first != second
    assert first.name.endswith("-alpha-org-Model-B-v1")


ABSURD = {
    "a key of 100,000 names": ".".join(["a"] * 100_000) + " = 1",
    "a key of 100,000 names in a value": "x = {" + ".".join(["a"] * 100_000) + " = 1}",
    "a table of 100,000 names": "[" + ".".join(["a"] * 100_000) + "]",
    "200,000 keys": "".join(f"a.k{i} = 1\n" for i in range(200_000)),
    "lists in lists": "a = " + "[" * 100_000,
    "lists in lists by the line": "a = " + "[\n" * 100_000,
    "tables in tables": "a = " + "{b = " * 30_000,
    "a long number": f"a = {'1' * 5_000}",
    "a text without its end": 'a = "' + '\\"' * 100_000,
    "a long text without its end": 'a = """' + '"' * 100_001,
    "a gigabyte": 1 << 30,
    "a folder": None,
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_toml_is_refused_in_one_line_and_at_once(tmp_path, name):
    path, content = tmp_path / "a.toml", ABSURD[name]
    if content is None:
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(content) if isinstance(content, int) else file.write(content.encode())
    began = time.process_time()
    for read in (read_preset, read_recipe, read_layout) if content is not None else (read_preset, read_layout):
        with pytest.raises(BadFile, match=r"nested|not TOML|too many|cannot read") as caught:
            read(path)
        assert "\n" not in str(caught.value)
    assert time.process_time() - began < 5


def test_brackets_and_dots_in_texts_are_no_nesting(tmp_path):
    texts = ("[" * 99, "." * 99, "it's {{{", "a # [", '"""')
    path = tmp_path / "a.toml"
    path.write_text("".join(f"k{i} = {json.dumps(text)}\n" for i, text in enumerate(texts)) + "# it's [[[\n")
    assert list(read_toml(path).values()) == list(texts)


# Links


@pytest.fixture
def links(tmp_path, monkeypatch):
    """A folder of links to a folder, a file and nothing elsewhere; the working folder is above both."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "links").mkdir()
    for name, to in (("folder", "../real"), ("file", "../real.txt"), ("nothing", "../gone")):
        (tmp_path / "links" / name).symlink_to(to)
    monkeypatch.chdir(tmp_path)
    return sorted(listing(tmp_path))


def test_a_run_at_a_link_is_in_the_folder_that_it_leads_to_and_the_link_stays(links, tmp_path):
    path = Path("links/folder")
    for overwrite in (False, True):
        with RunFolder(path, "alpha", argv=["alpha"], overwrite=overwrite) as run:
            run.results = {"overwrite": overwrite}
    assert path.is_symlink() and listing(tmp_path / "links") == ["file", "folder", "nothing"]
    assert read_run(tmp_path / "real")[1]["overwrite"] is True
    assert read_run(tmp_path / "real.replaced-1")[1]["overwrite"] is False
    with RunFolder(path / "below", "alpha"):
        pass
    assert is_run(tmp_path / "real" / "below")


def test_an_exported_folder_at_a_link_is_the_one_that_it_leads_to(links, tmp_path):
    with whole_folder("links/folder") as temporary:
        (temporary / "a").write_text("a")
    assert (tmp_path / "real" / "a").is_file() and listing(tmp_path / "links") == ["file", "folder", "nothing"]


def test_a_named_file_at_a_link_is_the_one_that_it_leads_to_and_a_file_of_kts_own_leads_nowhere(links, tmp_path):
    assert write_named("links/file", "new") == Path("links/file")
    assert (tmp_path / "real.txt").read_text() == "new" and Path("links/file").is_symlink()
    atomic_write("links/file", "own")
    assert (tmp_path / "real.txt").read_text() == "new" and not Path("links/file").is_symlink()
    write_named("/dev/null", "text")
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("below", ["", "/below", "/below/deep.txt"])
def test_a_link_to_nothing_is_refused_before_the_work_in_one_line(links, tmp_path, below):
    path = f"links/nothing{below}"
    (tmp_path / "links" / "ring").symlink_to("ring")
    for named, words in ((path, r"nothing is a link|it is a link"), (f"links/ring{below}", "is a link to ring")):
        for refuse in (
            check_writable,
            refuse_taken,
            lambda at: write_named(at, "text"),
            lambda at: RunFolder(at, "alpha").__enter__(),
            lambda at: whole_folder(at).__enter__(),
        ):
            with pytest.raises(NotWritable, match=rf"cannot write links.*({words}).*make that first") as caught:
                refuse(named)
            assert "\n" not in str(caught.value)
    assert sorted(listing(tmp_path)) == sorted([*links, "links/ring"])


def test_a_run_below_a_file_says_so(tmp_path):
    (tmp_path / "file").write_text("x")
    for below in ("file/run", "file/deep/run"):
        with pytest.raises(NotWritable, match="a part of the path is a file, not a folder; name another place"):
            RunFolder(tmp_path / below, "alpha").__enter__()
    assert listing(tmp_path) == ["file"]
