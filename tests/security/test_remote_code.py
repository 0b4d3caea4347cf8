"""Code that lies beside a model, a tokenizer or a data set is not run unless it was asked for; a pickle never is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from families import byte_level_tokenizer, tiny_module

import kt
from kt.errors import KtError
from kt.facts.corpus import Corpus

OWN_CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch() if "{marker}" == "" else Path("{marker}").touch()
from transformers import PretrainedConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
class Config(Qwen2Config):
    model_type = "foreign"
class Model(Qwen2ForCausalLM):
    config_class = Config
class Tok(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_module("qwen2").save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def foreign(whole, tmp_path, monkeypatch):
    """(folder, marker): a model with code of its own; the marker is there once the code has run."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, marker = tmp_path / "foreign", tmp_path / "ran"
    shutil.copytree(whole, folder)
    (folder / "own.py").write_text(OWN_CODE.format(marker=marker))
    return folder, marker


def changed(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(call):
    with pytest.raises(KtError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_model_with_code_of_its_own_is_refused_in_one_line(foreign):
    folder, marker = foreign
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    changed(folder / "config.json", auto_map=own, model_type="foreign", architectures=["Model"])
    assert "--trust-remote-code" in refusal(lambda: kt.load(folder))
    assert not marker.exists()


def test_a_known_model_with_code_beside_it_is_loaded_without_that_code(foreign):
    folder, marker = foreign
    changed(folder / "config.json", auto_map={"AutoModelForCausalLM": "own.Model"})
    assert type(kt.load(folder).module).__module__.startswith("transformers.")
    assert not marker.exists()


def test_a_tokenizer_with_code_of_its_own_does_not_run_it(foreign):
    folder, marker = foreign
    changed(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Tok", "own.Tok"]}, tokenizer_class="Tok")
    try:
        kt.load(folder)
    except KtError as error:
        assert "\n" not in str(error)
    assert not marker.exists()


def test_the_code_runs_when_it_is_asked_for(foreign):
    """Without this the tests above could pass for a reason of their own."""
    folder, marker = foreign
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    changed(folder / "config.json", auto_map=own, model_type="foreign", architectures=["Model"])
    script = f"import kt; kt.load({str(folder)!r}, trust_remote_code=True)"
    subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)  # its modules stay out of this one
    assert marker.exists()


def test_a_data_set_with_a_loading_script_does_not_run_it(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)  # a folder of this name is what `datasets` takes before it asks the Hub
    folder, marker = tmp_path / "own" / "foreign", tmp_path / "ran"
    folder.mkdir(parents=True)
    (folder / "foreign.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n")
    (folder / "README.md").write_text("# data\n")
    assert "cannot be read" in refusal(lambda: kt.load_facts("hf:own/foreign"))
    assert "cannot open" in refusal(lambda: list(Corpus.open("hf:own/foreign").texts()))
    assert not marker.exists()


class Touches:
    """What `pickle` runs on reading."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        from pathlib import Path

        return Path.touch, (Path(self.marker),)


def test_a_pickled_checkpoint_does_not_run_its_code(whole, tmp_path):
    import pickle

    import torch

    folder, marker = tmp_path / "pickled", tmp_path / "ran"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"model.embed_tokens.weight": Touches(marker)}, folder / "pytorch_model.bin")
    refusal(lambda: kt.load(folder))
    assert not marker.exists()
    for place in ("pytorch_model.bin", "model.safetensors"):
        (folder / place).write_bytes(pickle.dumps(Touches(marker)))
        refusal(lambda: kt.load(folder))
        assert not marker.exists()


def test_no_loader_opens_a_pickle(tmp_path):
    import pickle

    from kt.editing.closed_form.second_moment import Statistics

    marker = tmp_path / "ran"
    path = tmp_path / "edit.safetensors"
    path.write_bytes(pickle.dumps(Touches(marker)))
    for load in (kt.Edit.load, kt.Trace.load, kt.Probe.load, Statistics.open, kt.Balance.load, kt.Scores.load):
        refusal(lambda load=load: load(path))
    assert not marker.exists()
