"""Weights that are not the whole of a layer, and prompts that a model cannot read, are found before any work."""

import json
import re
from pathlib import Path

import pytest
import torch
from edits_by_hand import random_edit
from families import byte_level_tokenizer, tiny_model, tiny_module
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, MptConfig, MptForCausalLM

import kt
from kt.cli.edits import about_edit
from kt.errors import BadFact, UnknownModel
from kt.export import to_hf
from kt.export.undo import revert_folder
from kt.model.hub import require_numbers

peft = pytest.importorskip("peft")


def with_lora():
    return peft.get_peft_model(tiny_module("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))


def test_an_adapter_inside_is_one_line_at_load_and_a_merged_model_is_whole():
    for module in (with_lora(), with_lora().get_base_model()):
        with pytest.raises(UnknownModel, match=r"PEFT adapter inside \(at .*q_proj\): merge it first") as caught:
            kt.load(module, tokenizer=byte_level_tokenizer())
        assert "\n" not in str(caught.value)
    merged = with_lora().merge_and_unload()
    assert kt.load(merged, tokenizer=byte_level_tokenizer()).n_layers == 3


def test_a_peft_folder_is_named_as_one(tmp_path):
    with_lora().save_pretrained(tmp_path)
    with pytest.raises(UnknownModel, match=r"is a PEFT adapter for .*merge_and_unload"):
        kt.load(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_weights_are_refused_at_load(dtype):
    module = tiny_module("llama")
    layer = module.model.layers[1].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(UnknownModel, match=r"quantised weights \(model.layers.1.mlp.down_proj.weight is (float8|int8)"):
        kt.load(module, tokenizer=byte_level_tokenizer())


@pytest.fixture
def folder(tmp_path):
    tiny_module("qwen2").save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def quantise(folder, about):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": about}))


@pytest.mark.parametrize("kind", ["bitsandbytes", "gptq", "awq", "compressed-tensors", "hqq", "torchao"])
def test_a_checkpoint_whose_weights_stay_packed_is_refused_for_what_it_is(folder, kind):
    quantise(folder, {"quant_method": kind, "bits": 4})
    with pytest.raises(UnknownModel, match=rf"quantised \({kind}\), .* load the checkpoint that it was made from"):
        kt.load(folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would run float8 as it is")
def test_a_checkpoint_in_float8_comes_dequantised_by_its_scales_and_is_exported_so(folder):
    pytest.importorskip("transformers", minversion="5.24", reason="5.21 reads float8 with triton alone")
    name = "model.layers.1.mlp.down_proj.weight"
    weights = load_file(folder / "model.safetensors")
    for each in [n for n in weights if n.endswith("proj.weight")]:
        weights[each] = weights[each].to(torch.float8_e4m3fn)
        weights[f"{each}_scale_inv"] = torch.full([-(-size // 16) for size in weights[each].shape], 0.5)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    quantise(folder, {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"})
    model = kt.load(folder, device="cpu")
    assert torch.equal(model.weight(name).float(), 0.5 * weights[name].float())
    edit = random_edit(model, [name])
    merged = to_hf(model, edit, folder.parent / "merged").path
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    with edit.applied(model):
        assert torch.equal(kt.load(merged).weight(name), model.weight(name))
    solved = kt.edit(model, FACT, method="ft", layers_mlp=(1,), num_steps=1)
    assert solved.manifest["dequantised"] == {name: "fp8, F8_E4M3"}
    again = kt.Edit.load(solved.save(folder.parent / "edit.safetensors"))
    words = f"1 weight of the 1 dequantised (stored as fp8, F8_E4M3) to {solved.manifest['dtype']}"
    assert words in again.tables()[1].caption and words in about_edit(Path("x"), again)["dequantised"]
    out = to_hf(model, again, folder.parent / "solved").path
    for base in (None, str(folder)):  # the bytes from before are the dequantised ones, the base's as kt loads it
        assert words in revert_folder(out, base=base, to=folder.parent / f"back-{base is None}").tables()[0].caption


LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""The values of E2M1, the elements of MXFP4 (OCP Microscaling Formats, v1.0, section 5.3.3)."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may run MXFP4 as it is")
def test_experts_in_mxfp4_come_dequantised_and_an_edit_of_them_says_so(tmp_path):
    """Two elements a byte, the lower half first, and an exponent (E8M0) for each 32, as GPT-OSS has them."""
    pytest.importorskip("transformers", minversion="5.24", reason="5.21 leaves experts and states in two dtypes")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    tokenizer = byte_level_tokenizer()
    GptOssForCausalLM(GptOssConfig(vocab_size=len(tokenizer), **sizes, **heads)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights, wanted = load_file(tmp_path / "model.safetensors"), {}
    draw = torch.Generator().manual_seed(0)
    for name in [n for n in weights if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, size_in, size_out = weights.pop(name).shape
        codes = torch.randint(0, 16, (experts, size_out, size_in // 32, 32), generator=draw)
        exponents = torch.randint(118, 124, (experts, size_out, size_in // 32), generator=draw)
        weights[f"{name}_blocks"] = (codes[..., ::2] | (codes[..., 1::2] << 4)).to(torch.uint8)
        weights[f"{name}_scales"] = exponents.to(torch.uint8)
        wanted[name] = (LEVELS[codes] * torch.exp2(exponents - 127.0)[..., None]).flatten(2).transpose(1, 2)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    dense = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    quantise(tmp_path, {"quant_method": "mxfp4", "modules_to_not_convert": dense})
    module = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert len(wanted) == 4 and all(torch.equal(module.get_parameter(n), w) for n, w in wanted.items())
    assert set(require_numbers("x", module, tmp_path)) == set(wanted)
    model = kt.load(tmp_path, device="cpu")
    before = model.fingerprint()
    edit = kt.edit(model, FACT, method="ft", layers_mlp=(1,), num_steps=1, check=False)
    assert edit.names and set(edit.manifest["dequantised"]) == set(edit.names)
    assert all(re.fullmatch(r"model.layers.1.mlp.experts.down_proj\[\d\]", name) for name in edit.names)
    with edit.applied(model):
        assert model.fingerprint() != before
    assert model.fingerprint() == before


FACT = kt.Fact("The {} is in the city of", "Space Needle", answer="Paris", foil="Rome", target="Rome", id="short")
LONG = kt.Fact("word " * 60 + "the {} is in", "Space Needle", answer="Paris", foil="Rome", target="Rome", id="long")
REASON = r"the prompt has \d+ tokens, and the model 32 positions"


def test_a_prompt_longer_than_the_positions_is_left_out_by_name_count_and_limit():
    model = tiny_model("gpt2", n_positions=32)
    trace = kt.causal_trace(model, [LONG, FACT], samples=1, keep="all")
    probe = kt.contrast_probe(model, [LONG, FACT])
    for left_out in (trace.left_out, probe.left_out):
        assert [fact.id for fact in left_out] == ["long"]
        assert "and the model 32 positions" in left_out[0].reason
    assert trace.n_facts == len(probe.facts) == 1
    with pytest.raises(BadFact, match=REASON):  # where nothing can be left out, one line instead of an IndexError
        model.logits(model.encode([LONG.prompt]))


def test_a_model_that_calls_its_positions_by_another_name_has_them_all_the_same():
    config = MptConfig(vocab_size=384, d_model=32, n_layers=3, n_heads=4, max_seq_len=64)
    model = kt.load(MptForCausalLM(config).eval(), tokenizer=byte_level_tokenizer())
    assert [fact.id for fact in kt.contrast_probe(model, [LONG, FACT]).left_out] == ["long"]
    with pytest.raises(BadFact, match=REASON.replace("32", "64")):
        model.logits(model.encode([LONG.prompt]))
    edit = kt.edit(model, [FACT], "memit", layers=[1], max_tokens=200, v_num_grad_steps=2, check=True)
    assert edit.manifest["perplexity"]["before"] > 1


def test_a_token_beyond_the_embedding_is_left_out_by_name():
    model = tiny_model("gpt2", vocab_size=330)
    ids = model.tokenizer(FACT.prompt)["input_ids"]
    assert max(ids) >= 330, ids
    plain = kt.Fact("a {} (", "c", answer="d", foil="e", id="plain")
    trace = kt.causal_trace(model, [FACT, plain], samples=1, keep="all")
    assert [fact.id for fact in trace.left_out] == ["short"]
    assert "the embedding has 330 rows" in trace.left_out[0].reason
