"""Packed (quantised) linear maps are read as they stand, plain only while an edit writes them, and back to the byte."""

import hashlib
import warnings

import pytest
import torch
from edits_by_hand import random_edit
from families import byte_level_tokenizer, tiny_module
from packed_linears import Bytes, Curved, Float8, Nibbles, RoundedInputs, WrongMethod, packed_module
from torch import nn

import kt
from kt.cli.edits import about_edit
from kt.errors import KtError, UnknownModel
from kt.export import to_hf

DOWN, OUT = "model.layers.1.mlp.down_proj.weight", "model.layers.1.self_attn.o_proj.weight"
FACT = kt.Fact("The {} is in the city of", "Space Needle", answer="Paris", foil="Rome", target="Rome")


def loaded(kind, **changes):
    return kt.load(packed_module(kind, **changes), tokenizer=byte_level_tokenizer())


def bytes_of(module):
    """SHA-256 over a module's own tensors, without kt."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def says(model):
    return model.logits(model.encode([FACT.prompt]))


@pytest.mark.parametrize("kind", [Bytes, Nibbles, Float8, RoundedInputs, WrongMethod])
def test_an_edit_puts_a_plain_map_in_a_packed_ones_place_and_the_same_bytes_come_back(kind):
    model = loaded(kind)
    assert set(model.layout.linears) >= {"attn.q_proj", "attn.v_proj", "attn.o_proj", "mlp.up_proj", "mlp.down_proj"}
    handle = kt.load(model.module, tokenizer=model.tokenizer)  # another handle on the module, whose traces follow
    site = kt.Site("mlp", 1)
    mine, before, hashed = model.linear(site), says(model), bytes_of(model.module)
    want = mine.numbers() if hasattr(mine, "numbers") else mine.weight.float() * mine.weight_scale_inv
    assert torch.allclose(model.weight(DOWN), want, atol=1e-6 * float(want.abs().max()))
    edit = random_edit(model, [DOWN, OUT])
    assert bytes_of(model.module) == hashed and model.linear(site) is mine
    with edit.applied(model):
        plain = model.linear(site)
        assert type(plain) is nn.Linear and plain.weight.dtype == torch.float32
        assert torch.equal(plain.weight, model.weight(DOWN)) and not torch.equal(says(model), before)
        assert torch.allclose(plain.weight - edit.delta(DOWN), want, atol=1e-5)
        for each in (model, handle):  # traces read the map that now computes
            batch = each.encode([FACT.prompt])
            io = [each.read(batch, [site], end)[site].float() for end in ("key", "value")]
            assert torch.allclose(io[0] @ plain.weight.T, io[1], atol=1e-4)
    assert model.linear(site) is mine and bytes_of(model.module) == hashed and torch.equal(says(model), before)
    edit.apply_(model)
    assert edit.state_of(model) == dict.fromkeys([DOWN, OUT], "applied") and type(model.linear(site)) is nn.Linear
    edit.revert_(model)
    assert model.linear(site) is mine and bytes_of(model.module) == hashed and torch.equal(says(handle), before)


@pytest.mark.parametrize("method", ["ft", "memit", "lora"])
def test_methods_edit_packed_maps_and_the_file_says_how_they_are_kept(method, tmp_path):
    if method == "lora":
        pytest.importorskip("peft")
    model, settings = loaded(RoundedInputs), {"layers_mlp": (1,)}
    text = tmp_path / "text.txt"
    text.write_text("The city of Rome, and who lives there.\n" * 60)
    settings |= {"v_num_grad_steps": 2} if method == "memit" else {"num_steps": 2}
    hashed, mine = bytes_of(model.module), model.linear(kt.Site("mlp", 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        edit = kt.edit(model, FACT, method=method, corpus=str(text), **settings)
    assert bytes_of(model.module) == hashed and model.linear(kt.Site("mlp", 1)) is mine
    again = kt.Edit.load(edit.save(tmp_path / "edit.safetensors"))
    words = "1 weight of the 1 dequantised (packed as packed_linears, RoundedInputs) to float32"
    assert again.manifest["packed"] == {DOWN: "packed_linears, RoundedInputs"}
    assert words in again.tables()[1].caption and words in about_edit(tmp_path, again)["dequantised"]
    with again.applied(model):
        assert model.fingerprint([DOWN]) == again.manifest["fingerprints_after"][DOWN]
    dense = tiny_module("llama")  # the weights that were packed, and others of their form
    for other in (dense, packed_module(Nibbles)):
        with pytest.raises(KtError, match="not the weights that the edit was solved for"):
            again.apply_(kt.load(other, tokenizer=model.tokenizer))


def test_a_map_whose_output_no_weight_gives_is_read_and_refused_with_the_figure_before_any_work():
    model = loaded(Curved)
    kt.contrast_probe(model, [FACT])
    with pytest.raises(KtError, match=r"packed \(packed_linears, Curved\).*W·key \+ b misses \d+.\d% of it \(rounding"):
        kt.edit(model, FACT, method="ft", layers_mlp=(1,), num_steps=1)
    assert isinstance(model.linear(kt.Site("mlp", 1)), Curved)


def test_sessions_and_stacks_bring_the_packed_maps_back():
    model = loaded(Bytes)
    hashed = bytes_of(model.module)
    first, other = random_edit(model, [DOWN], seed=1), random_edit(model, [OUT], seed=2)
    stack = kt.EditStack([first])
    stack.apply_(model)
    stack.push(other)
    assert type(model.linear(kt.Site("attn", 1))) is nn.Linear
    stack.remove(1)
    assert isinstance(model.linear(kt.Site("mlp", 1)), Bytes)
    stack.revert_(model)
    assert bytes_of(model.module) == hashed
    one, two = first.applied(model), other.applied(model)  # tasks of one thread that take turns
    one.__enter__(), two.__enter__()
    one.__exit__(None, None, None), two.__exit__(None, None, None)
    assert bytes_of(model.module) == hashed
    session = kt.EditSession(model, method="ft", layers_mlp=(1,), num_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        session.edit([FACT])
        with session.unedited():
            assert bytes_of(model.module) == hashed
    assert type(model.linear(kt.Site("mlp", 1))) is nn.Linear
    session.revert()
    assert bytes_of(model.module) == hashed


def test_a_packed_head_is_read_as_it_stands_and_a_packed_embedding_is_refused():
    model = loaded(Bytes, among=("lm_head",), tie_word_embeddings=False)
    assert isinstance(model.head, Bytes) and model.vocab_size == len(model.embedding.weight)
    kt.contrast_probe(model, [FACT])
    module = tiny_module("llama", tie_word_embeddings=False)
    module.model.embed_tokens.weight = nn.Parameter(module.model.embed_tokens.weight.to(torch.int8), False)
    with pytest.raises(UnknownModel, match=r"quantised weights \(model.embed_tokens.weight is int8\)"):
        kt.load(module, tokenizer=byte_level_tokenizer())


def test_a_packed_model_that_no_config_describes_is_not_merged(tmp_path):
    model = loaded(Bytes)
    with pytest.raises(KtError, match="load the checkpoint that it was made from"):
        to_hf(model, random_edit(model, [DOWN]), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
