"""Blocks whose mixer is no attention, that have two mixers, or a mixer or an MLP alone."""

import pytest
import torch
from families import HYBRIDS, byte_level_tokenizer, tiny_model, tiny_module, wide_model

import kt
from kt.errors import UnknownModel, UnknownSite
from kt.model.explained import explained
from kt.model.sites import Kind, Site

MIXERS = {
    "qwen3_next": ("linear attention", "attention") * 2,
    "qwen3_5_text": ("linear attention", "attention") * 2,
    "lfm2": ("convolution", "attention", "convolution"),
    "jamba": ("state space", "attention", "state space"),
    "nemotron_h": ("state space", "", "attention", ""),
    "falcon_h1": ("attention",) * 3,
}
PROMPTS = ["The Space Needle is in the city of", "The mother tongue of Danielle Darrieux is French, and that of"]


@pytest.fixture(params=HYBRIDS)
def kind(request):
    return request.param


def test_the_layout_says_what_mixes_tokens_in_each_block(kind):
    model = tiny_model(kind)
    assert model.layout.mixers == MIXERS[kind]
    assert all(block.whole for block in explained(model))
    words = {"linear attention", "convolution", "state space"} & set(MIXERS[kind])
    assert all(f"of a {word}" in model.layout.describe() for word in words)


def test_rows_do_not_depend_on_padding(kind):
    model = tiny_model(kind)
    alone, together = model.logits(model.encode(PROMPTS[:1])), model.logits(model.encode(PROMPTS))
    assert torch.allclose(alone[0], together[0], atol=2e-6)


def test_every_map_onto_the_residual_stream_is_read_and_written(kind):
    model = wide_model(kind)
    before = model.fingerprint()
    for layer in range(model.n_layers):
        for role in model.layout.at(layer).ends:
            site = model.site(role, layer)
            found = {end: model.read(model.encode(PROMPTS[:1]), [site], end)[site][0] for end in ("key", "value")}
            error = found["value"] - found["key"] @ model.weight(site).T
            error = error - error[:1]  # a bias at most
            assert error.abs().max() < (1e-6 if kind == "nemotron_h" else 1e-12) * found["value"].abs().max()
            with model.restored([site]):
                model.write(site, torch.ones_like(model.weight(site)))
                assert model.fingerprint() != before
    assert model.fingerprint() == before


def test_a_block_without_a_part_says_so():
    model = tiny_model("nemotron_h")
    assert model.layers_with(Kind.ATTN) == (0, 2) and model.layers_with(Kind.MLP) == (1, 3)
    assert "a mixer or an MLP each" in model.layout.describe()
    with pytest.raises(UnknownSite, match=r"block 1 of .* has no attn.o_proj; it has .*mlp.down_proj"):
        model.weight_name(Site("attn", 1))


def test_two_mixers_side_by_side_are_two_parts():
    model = tiny_model("falcon_h1")
    assert model.layout.at(1).ends == {
        "attn.o_proj": "self_attn.o_proj",
        "attn.second": "mamba.out_proj",
        "mlp.down_proj": "feed_forward.down_proj",
    }
    assert "self_attn.o_proj beside mamba.out_proj" in model.layout.describe()


def test_a_part_that_does_not_reach_the_residual_stream_is_refused():
    module = tiny_module("falcon_h1")
    for block in module.model.layers:
        block.ssm_out_multiplier = 0.0
    with pytest.raises(UnknownModel, match=r"the output of mamba.out_proj does not reach the residual stream"):
        kt.load(module, tokenizer=byte_level_tokenizer())


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "jamba", "nemotron_h", "llama"])
def test_the_paths_of_a_layout_are_those_that_can_be_given(name):
    layout = tiny_model(name).layout
    again = kt.load(tiny_module(name), tokenizer=byte_level_tokenizer(), layout=layout.parts()).layout
    assert again == layout and {"blocks", "embed", "head"} <= set(layout.parts())
