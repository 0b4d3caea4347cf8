"""A block adds its attention's and its MLP's values to the residual stream, and nothing else: or it is found out."""

import pytest
import torch
from families import BASE, FUSED, GQA, SPECIAL, WIDE, byte_level_tokenizer, tiny_module
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import kt
from kt.model.layout import explained
from kt.model.ndif import simulated

NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
BEHIND = {"gemma2": NORMS, "gemma3_text": NORMS, "olmo2": NORMS}


def made(name, **changes):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**(BASE | WIDE | GQA | SPECIAL | changes))
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in module.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.5 / weight.shape[-1] ** 0.5)
    return kt.load(module, tokenizer=byte_level_tokenizer())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_block_of_every_family_is_explained_to_rounding(family, dtype):
    model = kt.load(tiny_module(family).to(dtype), tokenizer=byte_level_tokenizer())
    blocks = explained(model)
    assert len(blocks) == model.n_layers
    for block in blocks:
        assert block.whole and block.norms == BEHIND.get(family, (None, None))
        assert block.residual < {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 0.02}[dtype]
        assert block.scales == pytest.approx((1, 1), abs=0.01 if dtype is torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("family", ["gemma2", "opt", "gptj", *FUSED])
def test_a_remote_model_is_explained_alike(family):
    real = kt.load(tiny_module(family), tokenizer=byte_level_tokenizer())
    for there, here in zip(explained(simulated(real)), explained(real), strict=True):
        assert there.whole == here.whole and there.norms == here.norms
        assert there.scales == pytest.approx(here.scales, rel=1e-12)
        assert there.residual == pytest.approx(here.residual, rel=1e-6, abs=1e-12)


def test_a_multiplier_on_the_residual_is_found():
    for block in explained(made("granite", residual_multiplier=0.22)):
        assert block.whole and block.norms == (None, None)
        assert block.scales == pytest.approx((0.22, 0.22), rel=1e-5)


@pytest.mark.parametrize("name", ["qwen2_moe", "llama4_text", "granitemoeshared", "falcon_h1"])
def test_experts_beside_a_shared_one_and_a_second_mixer_are_found_missing(name):
    changes = {
        "qwen2_moe": dict(num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16),
        "llama4_text": dict(num_local_experts=2, head_dim=8, intermediate_size_mlp=48, interleave_moe_layer_step=1),
        "granitemoeshared": dict(num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=16),
        "falcon_h1": dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
    }
    for block in explained(made(name, **changes[name])):
        assert not block.whole and block.residual > 1000 * block.rounding
