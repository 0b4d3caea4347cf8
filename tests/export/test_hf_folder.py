"""A merged folder is the edited model, whole or absent."""

import errno
import json
import os
from types import SimpleNamespace

import pytest
import torch
from chat_templates import TEMPLATES, tokenizer_of
from export_help import PROMPTS, edited_logits, farthest, logits, plain, random_edit, saved, sums
from families import byte_level_tokenizer, sentencepiece_tokenizer, tiny_model, tiny_module
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

import kt
from kt._util.files import NotWritable
from kt.errors import KtError, WorkFailed
from kt.export import hf, to_hf
from kt.export import hf as checks
from kt.export import shards as folder
from kt.export.shards import Shards, as_saved, source_of
from kt.model.memory import NotEnoughMemory


def test_plain_transformers_loads_the_edited_model_of_every_family(model, tmp_path):
    edit, before = random_edit(model), model.fingerprint()
    made = to_hf(model, edit, tmp_path / "merged")
    assert model.fingerprint() == before
    assert made.max_error == 0.0 and made.prompts == 2
    assert [row["prompt"] for row in made.about["generated"]] == list(PROMPTS)
    again = plain(tmp_path / "merged")
    assert farthest(logits(again, AutoTokenizer.from_pretrained(tmp_path / "merged")), edited_logits(model, edit)) == 0
    assert farthest(logits(again, model.tokenizer), logits(model.module, model.tokenizer)) > 1e-3


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=list(TEMPLATES))
def test_a_model_that_is_asked_in_its_chat_template_is_exported(template, tmp_path):
    """The folder was asked without the template, and its logits called other ones."""
    tokenizer = tokenizer_of(template)
    model = kt.load(tiny_module("qwen2", vocab_size=len(tokenizer)), tokenizer=tokenizer, chat="always")
    made = to_hf(model, random_edit(model), tmp_path / "merged")
    assert made.max_error == 0.0 and kt.load(tmp_path / "merged", chat="always").chat is not None


@pytest.fixture
def tiny():
    return tiny_model("qwen2")


def test_what_is_kts_own_does_not_lie_beside_the_weights(tiny, tmp_path):
    """Servers take every safetensors file at the top of a folder without an index for weights."""
    to_hf(tiny, random_edit(tiny), tmp_path / "merged", check=False)
    top = {path.name for path in (tmp_path / "merged").iterdir() if path.is_file()}
    assert {name for name in top if name.endswith(".safetensors")} == {"model.safetensors"}
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= top
    assert set(sums(tmp_path / "merged" / "kt")) == {"edit.safetensors", "undo.safetensors", "export.json"}
    kept = kt.Edit.load(tmp_path / "merged" / "kt" / "edit.safetensors")
    assert kept.digest == random_edit(tiny).digest


def test_the_same_export_is_the_same_bytes(tiny, tmp_path):
    for name in ("a", "b"):
        to_hf(tiny, random_edit(tiny), tmp_path / name, check=False)
    assert sums(tmp_path / "a") == sums(tmp_path / "b")


@pytest.mark.parametrize(("size", "files"), [("1GB", 1), ("60KB", 4), ("100KB", 2)])
def test_the_folder_has_as_many_files_of_weights_as_its_source(tmp_path, size, files):
    saved(tiny_model("qwen2"), tmp_path / "first")
    # Saved by transformers after loading, which gives it the order in which it saves what it has loaded.
    saved(kt.load(tmp_path / "first", device="cpu"), tmp_path / "base", max_shard_size=size)
    model = kt.load(tmp_path / "base", device="cpu")
    assert source_of(model).number == files == len(list((tmp_path / "base").glob("*.safetensors")))
    made = to_hf(model, random_edit(model), tmp_path / "merged")
    assert made.about["shards"] == files == len(list((tmp_path / "merged").glob("*.safetensors")))
    assert where(tmp_path / "merged") == where(tmp_path / "base")


def where(folder):
    """Which weight is in which file."""
    return dict(Shards.open(folder).files)


def test_weights_are_counted_in_the_order_in_which_they_are_saved(tmp_path):
    """A loaded model is saved in another order than its modules stand in: lm_head before the rest."""
    model = kt.load(saved(tiny_model("qwen2"), tmp_path / "first"), device="cpu")
    saved(model, tmp_path / "base", max_shard_size="60KB")
    files = where(tmp_path / "base")
    order = [files[name] for name in as_saved(model.module)]
    assert order == sorted(order) and len(order) == len(files)
    modules = [files[name] for name in model.module.state_dict()]
    assert modules != sorted(modules)


def test_a_source_that_is_divided_otherwise_gives_the_number_alone(tmp_path):
    model = tiny_model("qwen2")
    saved(model, tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    files = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(sorted(weights))}
    for file in set(files.values()):
        part = {n: t for n, t in weights.items() if files[n] == file}
        save_file(part, tmp_path / "base" / file, metadata={"format": "pt"})
    (tmp_path / "base" / "model.safetensors").unlink()
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    again = kt.load(tmp_path / "base", device="cpu")
    assert to_hf(again, random_edit(again), tmp_path / "merged").about["shards"] == 3


def test_a_tied_head_is_not_counted_twice(tmp_path):
    saved(tiny_model("gpt2"), tmp_path / "base", max_shard_size="60KB")
    model = kt.load(tmp_path / "base", device="cpu")
    made = to_hf(model, random_edit(model), tmp_path / "merged")
    assert made.about["shards"] == made.about["source_shards"] > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_folder_keeps_the_dtype_that_the_model_was_loaded_in(tmp_path, dtype):
    model = kt.load(saved(tiny_model("llama"), tmp_path / "base"), dtype=dtype, device="cpu")
    made = to_hf(model, random_edit(model), tmp_path / "merged")
    assert made.dtype == str(dtype).removeprefix("torch.") and made.max_error == 0.0
    assert plain(tmp_path / "merged").dtype == dtype


def test_a_cast_that_no_file_holds_is_found(tmp_path):
    """Module.to also casts rotary frequencies, which a loaded model has in float32."""
    model = kt.load(tiny_module("llama").to(torch.bfloat16), tokenizer=byte_level_tokenizer())
    with pytest.raises(WorkFailed, match="though every weight is the same"):
        to_hf(model, random_edit(model), tmp_path / "merged")


def test_the_generation_config_comes_along(tiny, tmp_path):
    tiny.module.generation_config = GenerationConfig(do_sample=True, top_k=7, eos_token_id=1, pad_token_id=2)
    to_hf(tiny, random_edit(tiny), tmp_path / "merged")
    assert GenerationConfig.from_pretrained(tmp_path / "merged").top_k == 7


def nothing_left(path):
    return not list(path.iterdir())


def test_a_model_that_transformers_refuses_to_save_leaves_nothing(tiny, tmp_path):
    tiny.module.generation_config = GenerationConfig(do_sample=False, temperature=0.5)
    before = tiny.fingerprint()
    with pytest.raises(WorkFailed, match="transformers does not save this model"):
        to_hf(tiny, random_edit(tiny), tmp_path / "merged")
    assert nothing_left(tmp_path) and tiny.fingerprint() == before


def test_a_tokenizer_that_does_not_come_back_is_refused(tmp_path):
    """AutoTokenizer makes a Qwen2Tokenizer of every Qwen2 folder, which reads byte-level BPE only."""
    pytest.importorskip("transformers", minversion="5.12", reason="5.5 brings it back")
    model = tiny_model("qwen2", tokenizer=sentencepiece_tokenizer())
    with pytest.raises(WorkFailed, match="the tokenizer does not come back") as error:
        to_hf(model, random_edit(model), tmp_path / "merged")
    assert "Qwen2Tokenizer" in str(error.value) and ".tmp-" not in str(error.value)
    assert nothing_left(tmp_path)


def after_saving(monkeypatch, spoil):
    """Change what was saved before it is looked at."""
    save = hf.save_model

    def spoilt(model, into, source):
        save(model, into, source)
        spoil(model, into)

    monkeypatch.setattr(hf, "save_model", spoilt)


def test_a_weight_that_was_written_wrong_is_found_without_loading(tiny, tmp_path, monkeypatch):
    def spoil(model, into):
        path = into / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(bytes(content))

    after_saving(monkeypatch, spoil)
    with pytest.raises(WorkFailed, match="was written with other bytes"):
        to_hf(tiny, random_edit(tiny), tmp_path / "merged", check=False)
    assert nothing_left(tmp_path)


def test_a_folder_that_loads_as_another_model_is_found_by_its_logits(tiny, tmp_path, monkeypatch):
    def spoil(model, into):
        config = json.loads((into / "config.json").read_text())
        (into / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))

    after_saving(monkeypatch, spoil)
    with pytest.raises(WorkFailed, match="its logits differ"):
        to_hf(tiny, random_edit(tiny), tmp_path / "merged")
    assert nothing_left(tmp_path)
    to_hf(tiny, random_edit(tiny), tmp_path / "merged", check=False)  # so it is the check that found it


def test_no_room_for_the_second_copy_says_how_to_go_without(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("kt.model.memory.free_memory", lambda: 5000)
    with pytest.raises(NotEnoughMemory, match="--no-check"):
        to_hf(tiny, random_edit(tiny), tmp_path / "merged")
    assert nothing_left(tmp_path)
    assert to_hf(tiny, random_edit(tiny), tmp_path / "merged", check=False).max_error is None


def test_an_edit_of_another_model_is_refused_and_forced_at_will(tiny, tmp_path):
    foreign = random_edit(tiny_model("qwen2", seed=1))
    with pytest.raises(KtError, match="not the weights that the edit was solved for"):
        to_hf(tiny, foreign, tmp_path / "merged")
    assert nothing_left(tmp_path)
    with pytest.warns(UserWarning, match="forced"):
        to_hf(tiny, foreign, tmp_path / "merged", check=False, force=True)
    assert (tmp_path / "merged" / "config.json").exists()


def test_a_folder_that_is_taken_is_left_alone(tiny, tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(NotWritable, match="not empty"):
        to_hf(tiny, random_edit(tiny), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("where", ["before", "while", "library"])
def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(tiny, tmp_path, monkeypatch, where):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def of_rust(*_, **__):
        raise Exception("No space left on device (os error 28)")

    if where == "before":
        monkeypatch.setattr(folder.shutil, "disk_usage", lambda place: SimpleNamespace(free=100))
    elif where == "while":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(tiny.tokenizer, "save_pretrained", of_rust)
    with pytest.raises(NotWritable, match="free some space") as error:
        to_hf(tiny, random_edit(tiny), tmp_path / "new" / "merged")
    assert ".tmp-" not in str(error.value)
    assert nothing_left(tmp_path)


def test_ctrl_c_leaves_nothing_and_the_weights_as_they_were(tiny, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(hf, "check_tokenizer", interrupted)
    before = tiny.fingerprint()
    with pytest.raises(KeyboardInterrupt):
        to_hf(tiny, random_edit(tiny), tmp_path / "merged")
    assert nothing_left(tmp_path) and tiny.fingerprint() == before


def test_what_a_killed_export_left_goes_with_the_next(tiny, tmp_path):
    (tmp_path / "merged.tmp-0123abcd").mkdir()
    (tmp_path / "merged.tmp-0123abcd" / "model.safetensors").write_bytes(b"half")
    to_hf(tiny, random_edit(tiny), tmp_path / "merged", check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_no_path_of_this_machine_is_in_the_folder(tmp_path):
    saved(tiny_model("qwen2"), tmp_path / "secret-place" / "base")
    model = kt.load(tmp_path / "secret-place" / "base", device="cpu")
    to_hf(model, random_edit(model), tmp_path / "merged", check=False)
    own = tmp_path / "merged"
    told = b"".join(path.read_bytes() for path in own.rglob("*.json")) + (own / "kt" / "undo.safetensors").read_bytes()
    assert b'"model": "base"' in told and b"secret-place" not in told


def test_long_lists_of_requests_are_asked_in_part(tiny):
    edit = random_edit(tiny)
    edit.manifest["requests"] = edit.manifest["requests"] * 100
    assert len(checks.prompts_of(edit)) == checks.MOST_PROMPTS
    assert checks.next_logits(tiny, checks.prompts_of(edit)).shape == (checks.MOST_PROMPTS, 384)
