"""No file that kt reads can lead it to write outside the folder that the user named, or to show what lies there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hostile import alone, run
from whole_files import PLAIN

from kt.editing import Edit
from kt.editing.stack import load_stack
from kt.errors import KtError
from kt.facts import load_facts
from kt.model.update import LowRank
from kt.recipes import read_recipe
from kt.recipes.reading import FOLDER
from kt.runs.folder import FILES, MANIFEST, RunFolder

OUTSIDE = ("../../x", "/x", "..", ".", "a/b", "a\\b", "..\\x", "\x1b[31m", "C:x")
SECRET = "the secret of the house"


def refusal(call):
    with pytest.raises(KtError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def secret(tmp_path):
    """A file beside the folder that the user names."""
    path = tmp_path / "outside" / "secret.json"
    path.parent.mkdir()
    path.write_text(json.dumps([{"prompt": f"{{}} {SECRET}", "subject": "It", "answer": SECRET, SECRET: 1}]))
    return path


@pytest.fixture
def named(tmp_path):
    folder = tmp_path / "named"
    folder.mkdir()
    return folder


# Recipes


def recipe_with(label: str, path: Path) -> Path:
    text = (FOLDER / "jeep-table-4.toml").read_text(encoding="utf-8")
    first = next(iter(read_recipe("jeep-table-4").models))
    path.write_text(text.replace(f'"{first}"', json.dumps(label)).replace(f'"{first}/', f'"{label}/'), encoding="utf-8")
    return path


@pytest.mark.parametrize("label", OUTSIDE)
def test_a_recipes_label_is_no_path(named, label):
    assert "[models]" in refusal(lambda: read_recipe(recipe_with(label, named / "own.toml")))


def test_a_recipes_label_may_be_any_plain_name(named):
    assert "gpt-j 6b_v1.0+x" in read_recipe(recipe_with("gpt-j 6b_v1.0+x", named / "own.toml")).models


# Facts


def test_a_link_in_a_folder_of_facts_does_not_lead_out_of_it(named, secret):
    (named / "facts.json").write_text(json.dumps(PLAIN))
    assert len(load_facts(named)) == 2
    (named / "more.json").symlink_to(secret)
    line = refusal(lambda: load_facts(named))
    assert "more.json" in line and SECRET not in line


def test_a_link_inside_a_folder_of_facts_is_followed(named):
    (named / "facts.txt").write_text(json.dumps(PLAIN))
    (named / "facts.json").symlink_to("facts.txt")
    assert len(load_facts(named)) == 2


def test_a_folder_of_facts_that_holds_itself_is_read_once(named):
    (named / "facts.json").write_text(json.dumps(PLAIN))
    (named / "again.json").symlink_to(".")
    assert len(load_facts(named)) == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_no_file_of_facts(named):
    os.mkfifo(named / "facts.json")
    assert "does not exist" in refusal(lambda: load_facts(named / "facts.json"))


# Stacks


@pytest.fixture
def edit_file(named):
    update = LowRank(torch.ones(2, 1), torch.ones(1, 3))
    Edit({"a.weight": update}, {"method": "memit", "model": "tiny"}).save(named / "edit.safetensors")
    return named / "edit.safetensors"


def stack_of(file: str, edit_file: Path) -> Path:
    path = edit_file.with_name("stack.json")
    entry = {"file": file, "digest": Edit.load(edit_file).digest, "forced": False}
    path.write_text(json.dumps({"schema_version": 1, "kind": "edit-stack", "model": "tiny", "edits": [entry]}))
    return path


def test_a_stack_names_files_in_its_own_folder(edit_file, tmp_path):
    outside = tmp_path / "outside.safetensors"
    shutil.copy(edit_file, outside)
    edit_file.with_name("link.safetensors").symlink_to(outside)
    for name in ("../outside.safetensors", str(outside), "link.safetensors", "..\\outside.safetensors", "a/../../x"):
        stack = stack_of(name, edit_file)
        assert "folder" in refusal(lambda stack=stack: load_stack(stack)), name


def test_a_stack_with_a_file_of_its_own_is_read(edit_file):
    try:
        load_stack(stack_of("edit.safetensors", edit_file))
    except KtError as error:
        assert "folder" not in str(error)


# Merged folders


@pytest.mark.parametrize("file", ["../model.safetensors", "/model.safetensors", "a/../../model.safetensors"])
def test_an_index_of_weights_names_files_in_its_own_folder(named, file):
    from safetensors.torch import save_file

    from kt.export.shards import Shards

    save_file({"a": torch.ones(2)}, named.parent / "model.safetensors")
    (named / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    refusal(lambda: Shards.open(named).read("a"))


# Run folders


@pytest.fixture
def run_folder(named):
    with RunFolder(named / "run", command="alpha") as made:
        made.results = {"alpha": 0.3}
    return named / "run"


def test_a_manifests_list_of_files_is_not_followed(run_folder, secret):
    manifest = json.loads((run_folder / MANIFEST).read_text())
    manifest["files"] = ["../../outside/secret.json", str(secret), "/etc/passwd"]
    manifest["command_line"] = ["kt", "alpha"]
    (run_folder / MANIFEST).write_text(json.dumps(manifest))
    with alone(run_folder.parent):
        ran = run("report", "run", "-o", "page.html")
        assert ran.code == 0, ran.err
        assert SECRET not in Path("page.html").read_text() and "root:x:" not in Path("page.html").read_text()


@pytest.mark.parametrize("file", sorted(set(FILES.values())))
def test_a_link_in_a_run_folder_shows_nothing_of_where_it_leads(run_folder, secret, file):
    (run_folder / file).symlink_to(secret)
    with alone(run_folder.parent):
        ran = run("report", "run", "-o", "page.html")
        page = Path("page.html").read_text() if ran.code == 0 else ""
    assert SECRET not in page + ran.out + ran.err


def test_a_manifest_names_what_was_written_by_relative_paths(named):
    with RunFolder(named / "run", command="alpha") as made:
        (made.folder / "edits").mkdir()
        (made.folder / "edits" / "0001.safetensors").write_bytes(b"")
        made.results = {}
    manifest = json.loads((named / "run" / MANIFEST).read_text())
    assert manifest["files"] == ["edits/0001.safetensors", "results.json"]


def test_a_folder_of_something_else_is_not_replaced(named):
    precious = named / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    with pytest.raises(KtError, match="not a run of kt"), RunFolder(precious, command="alpha"):
        pass
    assert (precious / "thesis.txt").read_text() == "x"


def test_leftovers_that_are_links_are_not_emptied(named):
    precious = named.parent / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    (named / "run.tmp-0123abcd").symlink_to(precious)
    (named / "run.old-0123abcd").symlink_to(precious)
    with RunFolder(named / "run", command="alpha") as made:
        made.results = {}
    assert (precious / "thesis.txt").read_text() == "x"
