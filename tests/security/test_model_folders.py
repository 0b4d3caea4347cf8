"""A model folder from a stranger: what points out of it, or asks for the absurd, is one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from families import byte_level_tokenizer, tiny_module

import kt
from kt._util.data import tensor_header
from kt.errors import KtError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A tiny model with its weights in several files."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_module("llama").save_pretrained(folder, max_shard_size="60KB")
    byte_level_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def changed(path, **fields):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fields))


def refusal(folder, **options):
    with pytest.raises(KtError) as caught:
        kt.load(str(folder), device="cpu", **options)
    line = str(caught.value)
    assert line and "\n" not in line and len(line) < 700
    return line


# What points outside

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("index", [INDEX, "pytorch_model.bin.index.json", "model.safetensors.index.fp16.json"])
@pytest.mark.parametrize("file", ["../outside/x.safetensors", "/etc/passwd", "..", "a/../../x", "..\\x", 3, None])
def test_an_index_that_points_outside_is_refused_before_loading(folder, index, file):
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    changed(folder / index, weight_map=weight_map | {"model.norm.weight": file})
    assert "is no file of this folder" in refusal(folder)


@pytest.mark.parametrize("name", ["shard", "config.json", "tokenizer.json", "generation_config.json", "extra.gguf"])
def test_a_link_that_leads_out_of_a_model_folder_is_refused(folder, tmp_path, name):
    name = next(folder.glob("model-*.safetensors")).name if name == "shard" else name
    if (folder / name).exists():
        (folder / name).rename(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(b"GGUF")
    (folder / name).symlink_to(tmp_path / name)
    assert "link that leads out" in refusal(folder)


def test_a_link_inside_the_folder_and_a_link_to_the_folder_are_followed(folder, tmp_path):
    (folder / "config.json").rename(folder / "real.json")
    (folder / "config.json").symlink_to("real.json")
    (tmp_path / "link").symlink_to(folder)
    assert kt.load(tmp_path / "link", device="cpu").n_layers == 3


@pytest.mark.parametrize("base", ["/etc", "../../x", "someone/model", None, 3, ["a"]])
def test_an_adapter_is_refused_beside_whole_weights_and_beside_a_gguf_file(folder, base):
    changed(folder / "adapter_config.json", base_model_name_or_path=base, peft_type="LORA")
    assert "is a PEFT adapter for" in refusal(folder)
    (folder / "x.gguf").write_bytes(b"GGUF")
    assert "is a PEFT adapter for" in refusal(folder / "x.gguf")


@pytest.mark.parametrize("code", ["../code.Model", "someone/model--code.Model", "/tmp/code.Model", "a/b.Model"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_from_elsewhere_is_not_run_even_where_code_may_run(folder, code, file):
    changed(folder / file, auto_map={"AutoModelForCausalLM": code, "AutoTokenizer": [code, None]})
    assert "is not in the folder" in refusal(folder, trust_remote_code=True)
    assert kt.load(folder, device="cpu").n_layers == 3  # without leave it is not read at all


@pytest.mark.parametrize("name", ["vocab_file", "tokenizer_file", "fast_tokenizer_files"])
def test_a_tokenizer_that_names_a_file_outside_is_refused(folder, tmp_path, name):
    (tmp_path / "tokenizer.9.0.0.json").write_text("secret")
    file = "../tokenizer.9.0.0.json"
    changed(folder / "tokenizer_config.json", **{name: [file] if name.endswith("s") else file})
    assert "is not in the folder" in refusal(folder)
    pytest.importorskip("transformers", minversion="5.17", reason="5.12 needs the file that is named")
    changed(folder / "tokenizer_config.json", **{name: [] if name.endswith("s") else "/home/someone/long/gone.json"})
    assert kt.load(folder, device="cpu").n_layers == 3


# What asks for the absurd


def replaced(text):
    return {"type": "Replace", "pattern": {"String": text}, "content": 2 * text}


def header(length):
    return lambda path: path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])


DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
SIZES = ("num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size", "num_attention_heads")


@pytest.mark.parametrize("size", SIZES)
def test_an_absurd_size_is_one_line(folder, size):
    for value in (0, -1, 10**9, 10**12, 10**30, "12", float("nan"), 1.5, None, [1]):
        changed(folder / "config.json", **{size: value})
        refusal(folder)


@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", INDEX]
)
def test_a_file_of_absurd_json_is_one_line(folder, file):
    for text in (DEEP, "[]", "", '{"a": ' + "9" * 5_000 + "}", '{"a": NaN' + " " * (201 << 20) + "}"):
        (folder / file).write_text(text)
        refusal(folder)


@pytest.mark.parametrize(
    "field",
    [
        {"normalizer": {"type": "Sequence", "normalizers": [replaced("a")] * 40}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 10**6}},
        {"decoder": {"type": "Sequence", "decoders": [{"type": "Sequence", "decoders": [replaced("a")] * 20}] * 2}},
        {"post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}] * 10**4, "pair": []}},
        {"padding": {"strategy": {"Fixed": 10**10}}},
        {"padding": {"strategy": "BatchLongest", "pad_to_multiple_of": 10**10}},
    ],
)
def test_a_tokenizer_that_multiplies_its_text_is_one_line(folder, field):
    changed(folder / "tokenizer.json", **field)
    assert "times as long" in (line := refusal(folder)) or "pads every text" in line


@pytest.mark.parametrize(
    "field",
    [
        {"extra_special_tokens": [str(number) for number in range(30_000)]},
        {"model_max_length": "x"},
        {"eos_token": 3},
        {"added_tokens_decoder": [1]},
    ],
)
def test_an_absurd_setting_of_a_tokenizer_is_one_line(folder, field):
    changed(folder / "tokenizer_config.json", **field)
    refusal(folder)


@pytest.mark.parametrize("length", [0, 1, 99_000_000, 2**60, 2**64 - 1])
def test_an_absurd_header_of_weights_is_one_line(folder, length):
    header(length)(next(folder.glob("model-*.safetensors")))
    refusal(folder)


@pytest.mark.parametrize("length", [0x3C, 0x8B1F, 0xFEFF, 0xB528])
def test_a_header_whose_length_looks_like_another_format_is_read(tmp_path, length):
    """`<` begins HTML, 1f 8b gzip: a safetensors file begins with its header's length, which may be these bytes."""
    text = json.dumps({"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}).ljust(length)
    (path := tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + text.encode())
    assert list(tensor_header(path)) == ["a"]


@pytest.mark.parametrize("dtype", ["I32", "U8", "BOOL", "C64", "F8_E4M3", "NaN", "infinity"])
def test_weights_that_are_no_floats_or_not_finite_are_refused_by_name(folder, dtype):
    from safetensors.torch import load_file, save_file

    name = "model.layers.1.mlp.down_proj.weight"
    path = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    weights = load_file(path)
    stored = {"I32": "int32", "U8": "uint8", "BOOL": "bool", "C64": "complex64", "F8_E4M3": "float8_e4m3fn"}
    if dtype in stored:
        weights[name] = weights[name].to(getattr(torch, stored[dtype]))
    else:
        weights[name][1, 2] = float(dtype[:3])
    save_file(weights, path, metadata={"format": "pt"})
    assert name in (line := refusal(folder)) and dtype in line
