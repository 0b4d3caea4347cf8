"""A checkpoint is loaded whole, or refused with the weights that it lacks; what it has beside them is named."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from families import byte_level_tokenizer, tiny_module
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification, LlamaModel

import kt
from kt.cli import main
from kt.errors import UnknownModel
from kt.model.hub import require_whole

DOWN = "model.layers.1.mlp.down_proj.weight"


def saved(folder, module=None, shards="1GB", **changes):
    (module or tiny_module("llama", **changes)).save_pretrained(folder, max_shard_size=shards)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


def reconfigured(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def changed(folder, change, file="model.safetensors"):
    """The folder with other tensors in a file."""
    tensors = load_file(folder / file)
    save_file(change(tensors) or tensors, folder / file, metadata={"format": "pt"})
    return folder


def as_bin(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def shards(folder, change):
    """Many files, of which the third is changed, or gone."""
    file = sorted(saved(folder, shards="20KB").glob("model-*.safetensors"))[2]
    return changed(folder, change, file.name) if change else file.unlink() or folder


LACKING = {
    "a weight": (
        lambda d: changed(saved(d), without(DOWN)),
        f"lacks 1 of the 30 weights of a LlamaForCausalLM ({DOWN})",
    ),
    "a weight of a .bin": (lambda d: as_bin(changed(saved(d), without(DOWN))), f"({DOWN}), which would be random"),
    "layers": (lambda d: reconfigured(saved(d), num_hidden_layers=5), "(model.layers.3.input_layernorm.weight, "),
    "layers of a .bin": (lambda d: as_bin(reconfigured(saved(d), num_hidden_layers=5)), "lacks 18 of the 48 weights"),
    "biases": (lambda d: reconfigured(saved(d), attention_bias=True), "model.layers.0.self_attn.k_proj.bias"),
    "a head": (lambda d: changed(saved(d), without("lm_head.weight")), "(lm_head.weight)"),
    "the embedding that the head is": (
        lambda d: changed(saved(d, tie_word_embeddings=True), without("model.embed_tokens.weight")),
        "(lm_head.weight, model.embed_tokens.weight)",
    ),
    "everything": (
        lambda d: changed(saved(d), lambda t: {f"module.{k}": v for k, v in t.items()}),
        "lacks 30 of the 30",
    ),
    "a shard's tensors": (lambda d: shards(d, lambda t: {"x": torch.zeros(1)}), "lacks "),
    "a shard": (lambda d: shards(d, None), "model-00003-of"),
    "another width": (
        lambda d: reconfigured(saved(d), intermediate_size=64),
        "9 of the checkpoint's weights have another shape than its config asks for (model.layers.0.mlp.down_proj"
        ".weight is (32, 48), not (32, 64))",
    ),
    "another vocabulary": (
        lambda d: reconfigured(saved(d), vocab_size=400),
        "lm_head.weight is (384, 32), not (400, 32)",
    ),
    "a classifier": (
        lambda d: saved(d, LlamaForSequenceClassification(tiny_module("llama").config)),
        "(lm_head.weight)",
    ),
    "a model without a head": (lambda d: saved(d, LlamaModel(tiny_module("llama").config)), "(lm_head.weight)"),
    "bytes of a .bin": (
        lambda d: (as_bin(saved(d)) / "pytorch_model.bin").write_bytes(b"PK\3\4 cut short") and d,
        "cannot load folder",
    ),
}


@pytest.mark.parametrize("what", LACKING)
def test_a_checkpoint_that_lacks_something_is_refused_in_one_line(what, tmp_path):
    make, words = LACKING[what]
    folder = make(tmp_path / "model")
    with pytest.raises(UnknownModel) as refused:
        kt.load(folder)
    assert words in str(refused.value) and "\n" not in str(refused.value), str(refused.value)
    assert len(str(refused.value)) < 600


UNUSED = {
    "layers": (
        lambda d: reconfigured(saved(d), num_hidden_layers=2),
        "9 weights of the checkpoint not used, in no part of a LlamaForCausalLM: model.layers.2.",
    ),
    "a classifier's head": (
        lambda d: saved(d, LlamaForSequenceClassification(tiny_module("llama", tie_word_embeddings=True).config)),
        "score.weight",
    ),
    "others": (lambda d: changed(saved(d), lambda t: t | {"x\x1b[31m": torch.zeros(1)}), "x\\u001b[31m"),
}


@pytest.mark.parametrize("what", UNUSED)
def test_weights_that_are_not_used_are_named_in_one_line(what, tmp_path):
    make, words = UNUSED[what]
    with pytest.warns(UserWarning, match="not used") as said:
        kt.load(make(tmp_path / "model"))
    assert len(said) == 1 and words in str(said[0].message) and "\n" not in str(said[0].message)


def test_nothing_is_said_of_tied_weights_and_of_buffers_that_are_computed(tmp_path):
    folders = [saved(tmp_path / "tied", tie_word_embeddings=True), as_bin(saved(tmp_path / "bin"))]
    inv_freq = {
        "model.rotary_emb.inv_freq": torch.zeros(4),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
    }
    folders += [changed(saved(tmp_path / "old"), lambda t: t | inv_freq), saved(tmp_path / "gpt2", tiny_module("gpt2"))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for folder in folders:
            kt.load(folder)


def test_a_buffer_that_lacks_is_no_random_number_and_is_said():
    module = tiny_module("llama")
    module.register_buffer("counts", torch.zeros(2))
    about = {"missing_keys": {"counts"}, "unexpected_keys": set(), "mismatched_keys": set()}
    with pytest.warns(UserWarning, match="1 buffer not in the checkpoint, taken as a LlamaForCausalLM begins: counts"):
        require_whole("m", module, about)


def test_the_command_line_says_it_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = saved(tmp_path / "model")
    shutil.copytree(folder, tmp_path / "more")
    reconfigured(tmp_path / "more", num_hidden_layers=5)
    facts = ["--prompt", "The city of {} is", "--subject", "Rome", "--answer", "Italy", "--foil", "French"]
    assert main(["heatmap", "-m", "more", *facts]) == 2
    said = capsys.readouterr().err.rpartition("\r")[2].rpartition("it/s]\n")[2]  # behind the bar of saving
    assert said.startswith("kt: error: more: the checkpoint lacks 18 of the 48") and said.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "more"]
