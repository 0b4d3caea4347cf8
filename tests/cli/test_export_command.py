"""`kt export` and `kt revert`: what they leave, what they say, and what they refuse."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import pytest
import torch

import kt as library
from kt.editing import Edit
from kt.editing.apply import fingerprints
from kt.model.sites import Kind, Site
from kt.model.update import Dense, LowRank


@pytest.fixture(scope="module")
def base(model_folder):
    return library.load(model_folder, device="cpu")


@pytest.fixture(scope="module")
def edit_file(base, tmp_path_factory):
    draw = torch.Generator().manual_seed(0)
    names = [base.weight_name(Site(kind, 1)) for kind in (Kind.MLP, Kind.ATTN)]
    shapes = {name: base.weight(name).shape for name in names}
    updates = {
        name: LowRank(torch.randn(d_out, 2, generator=draw) * 0.2, torch.randn(2, d_in, generator=draw) * 0.2)
        for name, (d_out, d_in) in shapes.items()
    }
    request = {"id": "1", "prompt": "The mother tongue of {} is", "subject": "Marie Curie", "target_new": {"str": "x"}}
    about = {"model": base.name, "dtype": "float32", "fingerprints": fingerprints(base, names), "requests": [request]}
    return Edit(updates, about).save(tmp_path_factory.mktemp("edits") / "edit.safetensors")


@pytest.fixture
def export(kt, model_folder, edit_file):
    return lambda *more: kt("export", edit_file, "-m", model_folder, *more)


def test_a_merged_folder_is_written_told_and_taken_back(kt, export, base, edit_file):
    ran = export("--to", "merged", "--json", "-")
    assert ran.code == 0, ran.err
    assert ran.json["path"] == "merged" and ran.json["max_error"] == 0.0
    assert ran.json["dtype"] == "float32" and ran.json["shards"] == 1
    assert ran.json["generated"][0]["prompt"] == "The mother tongue of Marie Curie is"
    with Edit.load(edit_file).applied(base):
        assert library.load("merged", device="cpu").fingerprint() == base.fingerprint()
    found = kt("revert", "merged", "--json", "-")
    assert found.code == 0, found.err
    assert found.json["restored"] is True and found.json["already"] is False
    assert found.json["fingerprint"] == base.fingerprint() == library.load("merged", device="cpu").fingerprint()
    again = kt("revert", "merged")
    assert again.code == 0 and "already out" in again.err and base.fingerprint() in again.err


def test_an_adapter_is_written_and_told(export):
    ran = export("--format", "peft", "--to", "adapter", "--json", "-")
    assert ran.code == 0, ran.err
    assert ran.json["path"] == "adapter" and 0 < ran.json["max_error"] < 1e-4
    assert [row["rank"] for row in ran.json["weights"].values()] == [2, 2]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in Path("adapter").iterdir()}
    table = export("--format", "peft", "--to", "again").out
    assert "down_proj" in table and "rank" in table


def test_too_small_a_rank_fails_with_its_error_and_is_allowed_on_demand(export):
    ran = export("--format", "peft", "--to", "adapter", "--max-rank", 1)
    assert ran.code == 1 and "of its norm" in ran.err and ran.err.count("\n") == 1
    assert not Path("adapter").exists()
    assert export("--format", "peft", "--to", "adapter", "--max-rank", 1, "--max-error", 1).code == 0


def test_without_the_check_it_says_so(export):
    ran = export("--to", "merged", "--no-check", "--no-undo")
    assert ran.code == 0 and "not compared" in ran.err and "without the bytes" in ran.err
    assert not Path("merged/kt/undo.safetensors").exists()


def test_a_new_folder_from_the_base_model(kt, export, model_folder, base):
    assert export("--to", "merged", "--no-check", "--no-undo").code == 0
    refused = kt("revert", "merged")
    assert refused.code == 2 and "--base" in refused.err
    found = kt("revert", "merged", "--base", model_folder, "--to", "plain", "--json", "-")
    assert found.code == 0, found.err
    assert found.json["fingerprint"] == base.fingerprint() and found.json["path"] == "plain"


def test_revert_of_a_changed_weight_is_one_line(kt, export):
    from safetensors.torch import load_file, save_file

    assert export("--to", "merged", "--no-check").code == 0
    weights = load_file("merged/model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] += 1
    save_file(weights, "merged/model.safetensors", metadata={"format": "pt"})
    ran = kt("revert", "merged")
    assert ran.code == 2 and "neither" in ran.err and ran.err.count("\n") == 1


REFUSED = [
    (("--to", "x", "--format", "gguf"), "--format 'gguf'"),
    ((), "kt export edit.safetensors --to FOLDER"),
    (("--to", "x", "--max-rank", "2"), "--max-rank belongs to --format peft"),
    (("--to", "x", "--max-rank", "0", "--format", "peft"), "max-rank"),
    (("--to", "x", "--max-error", "-1", "--format", "peft"), "max-error"),
    (("--to", "x", "--format", "peft", "--adapter-dtype", "fp8"), "--adapter-dtype 'fp8'"),
    (("--to", "x", "--format", "peft", "--no-undo"), "--no-undo belongs to --format hf"),
    (("--to", "taken"), "not empty"),
    (("--to", "taken/file"), "not empty"),
    (("--to", "taken/file/x"), "cannot write"),
    (("--to", "/proc/kt"), "cannot write"),
]


@pytest.mark.parametrize(("arguments", "says"), REFUSED)
def test_what_cannot_work_is_refused_before_the_model_loads(kt, edit_file, arguments, says):
    Path("taken").mkdir()
    Path("taken/file").write_text("x")
    ran = kt("export", edit_file, "-m", "never-looked-at", *arguments)
    assert ran.code == 2 and says in ran.err and ran.err.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == ["taken"] and Path("taken/file").read_text() == "x"


def test_an_edit_of_another_model_is_refused(kt, edit_file):
    ran = kt("export", edit_file, "--to", "merged")  # on the embedded model
    assert ran.code == 2 and ran.err.count("\n") == 1
    assert not list(Path().iterdir())


def test_no_edit_file_and_no_merged_folder(kt, model_folder):
    ran = kt("export", model_folder / "model.safetensors", "-m", model_folder, "--to", "x")
    assert ran.code == 2 and ran.err.count("\n") == 1
    assert kt("export", "nowhere.safetensors", "--to", "x").code == 2
    assert "kt revert FOLDER" in kt("revert").err
    assert "--edit" in kt("revert", model_folder).err
    for folder in ("nowhere", "."):
        assert kt("revert", folder).code == 2


def test_a_full_disk_is_one_line_and_leaves_nothing(export, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for form in ("hf", "peft"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            ran = export("--format", form, "--to", "out", "--quiet")
        assert ran.code == 2 and "the disk is full" in ran.err and ran.err.count("\n") == 1
        assert not list(Path().iterdir())


def test_without_peft_the_refusal_comes_first(kt, edit_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    ran = kt("export", edit_file, "-m", "never-looked-at", "--format", "peft", "--to", "x")
    assert ran.code == 2 and "pip install 'kt-interp[lora]'" in ran.err


def test_biases_cannot_be_an_adapter(kt, base, model_folder):
    name = "model.layers.0.input_layernorm.weight"
    about = {"model": base.name, "dtype": "float32", "fingerprints": fingerprints(base, [name]), "requests": []}
    Edit({name: Dense(torch.ones(32))}, about).save("edit.safetensors")
    ran = kt("export", "edit.safetensors", "-m", model_folder, "--format", "peft", "--to", "x")
    assert ran.code == 2 and name in ran.err and "--format hf" in ran.err
    assert kt("export", "edit.safetensors", "-m", model_folder, "--to", "x").code == 0


def test_a_merge_that_fails_does_not_take_the_solved_edit_with_it(
    kt, model_folder, facts_file, corpus_file, monkeypatch
):
    def full(*_, **__):
        from kt._util.files import NotWritable

        raise NotWritable("cannot write merged: the disk is full")

    monkeypatch.setattr("kt.export.to_hf", full)
    solving = ("--layers-mlp", "0", "--layers-attn", "1", "--alpha", "0.3", "--corpus", corpus_file, "--limit", 1)
    ran = kt(
        "apply-edit",
        "-m",
        model_folder,
        "--edits",
        facts_file,
        *solving,
        "-o",
        "run",
        "--merge-to",
        "merged",
        "--force",
    )
    assert ran.code == 2 and "the disk is full" in ran.err
    assert Edit.load("run/edit.safetensors").names
    assert "merged" not in json.loads(Path("run/results.json").read_text())
