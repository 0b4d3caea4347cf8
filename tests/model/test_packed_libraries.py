"""Formats of libraries that run on a CPU: a quantised folder is loaded, edited, merged, and loaded by transformers."""

import json
from importlib.util import find_spec

import pytest
import torch
from edits_by_hand import random_edit
from families import byte_level_tokenizer, tiny_module
from safetensors.torch import load_file, save_file
from test_packed import FACT, bytes_of, says
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import kt
from kt.errors import KtError, UnknownModel
from kt.export import to_hf
from kt.export.undo import revert_folder

DOWN = "model.layers.1.mlp.down_proj.weight"


def of_torchao(name):
    from torchao import quantization

    return TorchAoConfig(getattr(quantization, name)())


def bits(**settings):
    return BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **settings)


FORMATS = {
    "int8": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "nf4": ("bitsandbytes", lambda: bits(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "fp4, twice": ("bitsandbytes", lambda: bits(load_in_4bit=True, bnb_4bit_use_double_quant=True)),
    "int8 weights": ("torchao", lambda: of_torchao("Int8WeightOnlyConfig")),
    "int8 weights and inputs": ("torchao", lambda: of_torchao("Int8DynamicActivationInt8WeightConfig")),
    "float8 weights": ("torchao", lambda: of_torchao("Float8WeightOnlyConfig")),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_folder_is_read_edited_merged_and_loaded_by_transformers(name, tmp_path):
    library, config = FORMATS[name]
    pytest.importorskip(library)
    sizes = dict(hidden_size=64, intermediate_size=128, head_dim=16)
    tiny_module("llama", **sizes).save_pretrained(tmp_path / "plain")
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config()).save_pretrained(
        tmp_path / "q"
    )
    byte_level_tokenizer().save_pretrained(tmp_path / "q")
    model = kt.load(tmp_path / "q", device="cpu")
    assert set(model.layout.linears) >= {"attn.q_proj", "attn.v_proj", "mlp.up_proj", "mlp.down_proj"}
    assert model.packing([DOWN])[DOWN].startswith(library) and not model.dequantised
    kt.contrast_probe(model, [FACT])
    before, hashed, mine = says(model), model.fingerprint(), model.linear(kt.Site("mlp", 1))
    assert hashed == kt.load(tmp_path / "q", device="cpu").fingerprint()
    edit = random_edit(model, [DOWN])
    with edit.applied(model):
        edited = says(model)
        assert type(model.linear(kt.Site("mlp", 1))) is torch.nn.Linear
    assert model.linear(kt.Site("mlp", 1)) is mine and model.fingerprint() == hashed
    assert torch.equal(says(model), before) and not torch.equal(edited, before)
    merged = to_hf(model, edit, tmp_path / "merged").path
    again = AutoModelForCausalLM.from_pretrained(merged)
    plain = again.model.layers[1].mlp.down_proj.weight
    with edit.applied(model):
        assert torch.equal(plain, model.weight(DOWN))  # of the logits to_hf says that they are equal to the bit
    skipped = json.loads((merged / "config.json").read_text())["quantization_config"]
    assert DOWN.removesuffix(".weight") in json.dumps(skipped)
    with pytest.raises(KtError, match="and not their packed bytes"):
        revert_folder(merged)


def test_a_folder_of_compressed_tensors_comes_dequantised(tmp_path):
    pytest.importorskip("compressed_tensors")
    tiny_module("llama").save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    weights, scheme = load_file(tmp_path / "model.safetensors"), {"num_bits": 8, "type": "int", "strategy": "channel"}
    for name in [name for name in weights if name.endswith("proj.weight")]:
        weights[f"{name}_scale"] = weights[name].abs().amax(1, keepdim=True) / 127
        weights[name] = (weights[name] / weights[f"{name}_scale"]).round().to(torch.int8)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    about = {"quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed"}
    about |= {"config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}}, "ignore": ["lm_head"]}
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
    model = kt.load(tmp_path, device="cpu")
    assert not model.packing([DOWN]) and model.dequantised[DOWN] == "compressed-tensors, I8"
    assert torch.equal(model.weight(DOWN), weights[DOWN].float() * weights[f"{DOWN}_scale"])


def test_a_map_that_bitsandbytes_repacked_is_refused(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    module = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4")
    if not module.support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no kernel to repack for")
    model = tiny_module("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    model.model.layers[0].self_attn.o_proj = module.to("cpu").eval()
    with torch.no_grad():
        model(torch.tensor([[3, 4]]))
    with pytest.raises(UnknownModel, match=r"self_attn.o_proj was repacked by bitsandbytes .* load the model again"):
        kt.load(model, tokenizer=byte_level_tokenizer())


@pytest.mark.skipif(find_spec("optimum") is None, reason="optimum-quanto is not installed")
def test_a_format_that_transformers_does_not_save_is_edited_and_not_merged(tmp_path):
    from transformers import QuantoConfig

    tiny_module("llama").save_pretrained(tmp_path / "plain")
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=QuantoConfig(weights="int8"))
    model = kt.load(module, tokenizer=byte_level_tokenizer())
    hashed = bytes_of(model.module)
    edit = random_edit(model, [DOWN])
    edit.apply_(model)
    edit.revert_(model)
    assert bytes_of(model.module) == hashed
    with pytest.raises(KtError, match=r"transformers saves no model of this kind .*; load the checkpoint"):
        to_hf(model, edit, tmp_path / "merged")


def test_what_runs_on_a_gpu_only_is_refused_by_format_and_library_before_weights(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    tiny_module("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "model.safetensors").unlink()
    for kind, words in {
        "higgs": r"quantised \(higgs\), which flute-kernel runs on a GPU only",
        "eetq": r"quantised \(eetq\), which kernels runs on a GPU only",
        "new\n": r"quantised \(new.*\), and kt knows fp8, mxfp4",
    }.items():
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": kind}}))
        with pytest.raises(UnknownModel, match=words + r".*; load the checkpoint that it was made from") as caught:
            kt.load(tmp_path)
        assert "\n" not in str(caught.value)
