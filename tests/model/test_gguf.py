"""A GGUF file gives the model that was written into it; one that cannot be read is refused in one line."""

import json

import numpy as np
import pytest
import torch
from families import byte_level_tokenizer, tiny_module

import kt
from kt.cli import main
from kt.editing.apply import fingerprints
from kt.errors import KtError, UnknownModel
from kt.export import to_hf
from kt.export.undo import revert_folder
from kt.model import gguf as reader
from kt.model.sites import Kind, Site
from kt.model.update import Dense

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")

PROMPT = "The mother tongue of Danielle Darrieux is"
HEADS, GROUPS = 4, 2
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def gguf_name(name):
    if name in NAMES:
        return NAMES[name]
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}"


def interleaved(weight, heads):
    """Rows of a query or key projection in the order of llama.cpp, whose rotary pairs are neighbours."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write(path, module, architecture="llama", quantised=(), without=(), tokenizer=True, values=()):
    """Write a Llama module as llama.cpp's converter does."""
    config, writer = module.config, gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if tokenizer:
        core = json.loads(byte_level_tokenizer().backend_tokenizer.to_str())["model"]
        tokens = sorted(core["vocab"], key=core["vocab"].get)
        tokens += [f"<unused{number}>" for number in range(config.vocab_size - len(tokens))]
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token in ("<s>", "</s>", "<pad>") else 1 for token in tokens])
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in core["merges"]])
        writer.add_bos_token_id(0)
        writer.add_add_bos_token(False)
        writer.add_eos_token_id(1)
        writer.add_pad_token_id(2)
    for key, value in values:
        writer.add_uint16(key, value)
    for name, tensor in module.state_dict().items():
        array = tensor.numpy()
        if name.endswith("q_proj.weight"):
            array = interleaved(array, HEADS)
        if name.endswith("k_proj.weight"):
            array = interleaved(array, GROUPS)
        if name in without:
            continue
        kind = gguf.GGMLQuantizationType.Q8_0
        if any(part in name for part in quantised):
            writer.add_tensor(gguf_name(name), gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def module():
    return tiny_module("llama", num_hidden_layers=2, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def whole(module, tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", module)


@torch.no_grad()
def logits(module, tokenizer):
    return module(**tokenizer(PROMPT, return_tensors="pt")).logits


def test_a_file_and_its_folder_give_the_weights_and_the_tokenizer_that_were_written(module, whole):
    for given in (whole, str(whole.parent)):
        model = kt.load(given, device="cpu")
        assert model.dtype == torch.float32
        for name, tensor in module.state_dict().items():
            assert torch.equal(model.module.state_dict()[name], tensor), name
        assert model.tokenizer(PROMPT)["input_ids"] == byte_level_tokenizer()(PROMPT)["input_ids"]
        assert torch.equal(logits(model.module, model.tokenizer), logits(module, byte_level_tokenizer()))
    assert model.fingerprint() == kt.load(module, tokenizer=byte_level_tokenizer()).fingerprint()


def test_quantised_weights_come_dequantised_and_in_the_dtype_asked_for(module, tmp_path):
    path = write(tmp_path / "q8.gguf", module, quantised=("v_proj", "up_proj"))
    model = kt.load(path, device="cpu")
    state, wanted = model.module.state_dict(), module.state_dict()
    name = "model.layers.1.mlp.up_proj.weight"
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = torch.from_numpy(gguf.dequantize(gguf.quantize(wanted[name].numpy(), kind), kind))
    assert torch.equal(state[name], expected)
    assert 0 < float((state[name] - wanted[name]).abs().max()) < 0.01
    narrow = kt.load(path, dtype="bf16", device="cpu")
    assert torch.equal(narrow.module.state_dict()[name], expected.bfloat16())
    assert narrow.fingerprint() != model.fingerprint()


def test_an_edit_says_which_of_its_weights_the_file_holds_quantised(module, whole, tmp_path):
    pytest.importorskip("transformers", minversion="5.12", reason="5.5 wants an unknown token of every vocabulary")
    path = write(tmp_path / "q8.gguf", module, quantised=("layers.1.mlp.up_proj",))
    model, facts = (
        kt.load(path, device="cpu"),
        [{"prompt": PROMPT, "subject": "Danielle Darrieux", "target": "Italian"}],
    )
    edit = kt.edit(model, facts, method="ft", layers_mlp=(0, 1), modules="mlp.up_proj", num_steps=1)
    name = "model.layers.{}.mlp.up_proj.weight".format
    assert set(edit.names) == {name(0), name(1)} and edit.manifest["dequantised"] == {name(1): "GGUF, Q8_0"}
    again = kt.Edit.load(edit.save(tmp_path / "edit.safetensors"))
    words = "1 weight of the 2 dequantised (stored as GGUF, Q8_0) to float32"
    assert words in again.tables()[1].caption
    merged = to_hf(model, again, tmp_path / "merged").path
    assert words in revert_folder(merged, base=str(path), to=tmp_path / "back").tables()[0].caption
    assert kt.load(tmp_path / "back", device="cpu").fingerprint() == model.fingerprint()
    assert kt.load(whole, device="cpu").dequantised == {}


def test_an_edit_merges_into_an_ordinary_folder_and_comes_out_again(whole, tmp_path):
    pytest.importorskip("transformers", minversion="5.12", reason="5.5 wants an unknown token of every vocabulary")
    model = kt.load(whole, device="cpu")
    before = model.fingerprint()
    name = model.weight_name(Site(Kind.MLP, 1))
    update = Dense(torch.randn(32, 48, generator=torch.Generator().manual_seed(0)))
    text = "The mother tongue of {} is"
    fact = {"id": "1", "prompt": text, "subject": "Danielle Darrieux", "target_new": {"str": "Italian"}}
    about = {"method": "by hand", "model": model.name, "dtype": "float32", "requests": [fact]}
    edit = kt.Edit({name: update}, about | {"fingerprints": fingerprints(model, [name])})
    made = to_hf(model, edit, tmp_path / "merged")
    assert made.max_error == 0.0 and model.fingerprint() == before
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config and config["model_type"] == "llama"
    assert str(whole.parent) not in (tmp_path / "merged" / "config.json").read_text()
    again = kt.load(tmp_path / "merged", device="cpu")
    with edit.applied(model):
        assert again.fingerprint() == model.fingerprint() != before
    revert_folder(tmp_path / "merged")
    assert kt.load(tmp_path / "merged", device="cpu").fingerprint() == before


def cut(path, whole, size):
    path.write_bytes(whole.read_bytes()[:size])
    return path


def test_a_broken_file_is_named_before_anything_is_read(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "_dequantise", lambda path: pytest.fail("went on to the weights"))
    size = whole.stat().st_size
    for path, said in (
        (cut(tmp_path / "empty.gguf", whole, 0), "is empty"),
        (cut(tmp_path / "magic.gguf", whole, 4), "breaks within its header"),
        (cut(tmp_path / "header.gguf", whole, 900), "breaks within its header"),
        (cut(tmp_path / "data.gguf", whole, size - 4000), "is cut short"),
        (tmp_path / "absent.gguf", "no such file"),
    ):
        refused(path, said)
    pointer = tmp_path / "pointer.gguf"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 98362432\n")
    refused(pointer, "Git LFS pointer")
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04" + bytes(100))
    refused(other, "is no GGUF file")
    newer = tmp_path / "newer.gguf"
    newer.write_bytes(b"GGUF" + (9).to_bytes(4, "little") + bytes(16))
    refused(newer, "version 9")


def refused(path, said):
    with pytest.raises(UnknownModel) as error:
        kt.load(path, device="cpu")
    assert said in str(error.value) and path.name in str(error.value)
    assert "\n" not in str(error.value)


def test_every_cut_of_the_header_is_refused(whole, tmp_path):
    """No cut gives another error than ours, wherever it falls."""
    end = reader.read_header(whole).end
    for size in range(1, end, max(1, end // 150)):
        with pytest.raises(UnknownModel):
            reader.read_header(cut(tmp_path / "cut.gguf", whole, size))


def test_a_foreign_architecture_is_named_with_those_that_are_supported(module, tmp_path, monkeypatch):
    path = write(tmp_path / "foreign.gguf", module, architecture="rwkv6")
    monkeypatch.setattr(reader, "find_spec", lambda name: None)  # said also where the package is missing
    with pytest.raises(UnknownModel, match=r"'rwkv6'.*supported are .*gemma3.*llama.*qwen2moe") as error:
        kt.load(path)
    assert "t5" not in str(error.value)


def test_a_part_a_file_without_tokenizer_and_one_without_all_weights_are_refused(module, tmp_path):
    refused(write(tmp_path / "part.gguf", module, values=[("split.count", 3)]), "one of 3 parts")
    bare = write(tmp_path / "bare.gguf", module, tokenizer=False)
    refused(bare, "holds no tokenizer")
    given = kt.load(bare, tokenizer=byte_level_tokenizer(), device="cpu")
    assert given.tokenizer is byte_level_tokenizer()
    name = "model.layers.1.mlp.up_proj.weight"
    refused(write(tmp_path / "less.gguf", module, without=[name]), name)


def test_the_missing_package_is_named(whole, monkeypatch):
    monkeypatch.setattr("kt.errors.find_spec", lambda name: None)
    with pytest.raises(KtError, match=r"pip install 'kt-interp\[gguf\]'"):
        kt.load(whole)


def test_of_several_files_in_a_folder_one_has_to_be_given(whole, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(whole.read_bytes())
    with pytest.raises(KtError, match=r"2 GGUF files \(a\.gguf, b\.gguf\); give one"):
        kt.load(tmp_path)
    assert reader.find_gguf(tmp_path / "b.gguf") == tmp_path / "b.gguf"
    (tmp_path / "model.safetensors").touch()
    assert reader.find_gguf(tmp_path) is None  # an ordinary folder, whatever else lies in it


def test_the_command_line_says_it_on_one_line_with_exit_code_2(whole, tmp_path, capsys):
    path = cut(tmp_path / "data.gguf", whole, whole.stat().st_size - 4000)
    assert main(["heatmap", "-m", str(path), "--limit", "1", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "is cut short" in said
