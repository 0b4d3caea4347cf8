"""A block adds its attention's and its MLP's values to the residual stream, and nothing else: or it is found out."""

import re

import pytest
import torch
from families import BASE, FUSED, GQA, SPECIAL, WIDE, byte_level_tokenizer, tiny_module
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
)

import kt
from kt.errors import UnknownModel
from kt.model.explained import explained
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


REFUSED = {
    "minimax": (
        dict(num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 3),
        "the block (MiniMaxDecoderLayer) holds self_attn (MiniMaxAttention)",
    ),
    "opt": (
        dict(ffn_dim=48, word_embed_proj_dim=32, do_layer_norm_before=False),
        "the block (OPTDecoderLayer) holds self_attn (OPTAttention)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_block_that_adds_more_than_its_parts_is_refused_with_what_is_in_it(name):
    changes, words = REFUSED[name]
    with pytest.raises(UnknownModel, match=r"in 3 of 3 blocks .* do not make the whole change") as caught:
        made(name, **changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    share = float(re.search(r"([\d.]+)% of it is not theirs", str(caught.value))[1])
    assert 1 < share < 300


def test_a_shared_expert_without_its_mixture_leaves_a_part_unexplained():
    changes = dict(num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING["qwen2_moe"](**(BASE | WIDE | GQA | SPECIAL | changes)), dtype=torch.float32
    )
    with pytest.raises(UnknownModel, match=r"mixture of 4 experts \(mlp.experts, with the router mlp.gate\) beside"):
        kt.load(
            module,
            tokenizer=byte_level_tokenizer(),
            layout={"down_proj": "mlp.shared_expert.down_proj", "mlp": "mlp.shared_expert"},
        )


@pytest.mark.parametrize("name", ["jetmoe", "dbrx"])
def test_experts_that_kt_cannot_take_apart_are_refused(name):
    changes = {
        "jetmoe": dict(num_local_experts=4, num_experts_per_tok=2, kv_channels=8, num_key_value_heads=2),
        "dbrx": dict(
            d_model=32,
            n_heads=4,
            n_layers=3,
            attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4),
            ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4),
        ),
    }
    words = {
        "jetmoe": "a mixture of 4 experts (mlp.input_linear",
        "dbrx": "did not find an MLP: outside norm_attn_norm",
    }
    with pytest.raises(UnknownModel, match=re.escape(words[name])):
        made(name, **changes[name])


def test_falcon_has_no_norm_behind_and_granite_a_multiplier_alone():
    falcon = made("falcon", num_kv_heads=4, parallel_attn=True)
    assert falcon.layout.parallel and falcon.layout.direct and not falcon.layout.has_post_norm
    granite = made("granite", residual_multiplier=0.22)
    assert not granite.layout.direct and not granite.layout.has_post_norm
    assert ", scaled)" in granite.layout.describe()


def test_where_weights_are_not_here_the_check_is_left_out_with_a_reason():
    real = kt.load(tiny_module("gemma2"), tokenizer=byte_level_tokenizer())
    far = simulated(real)
    assert far.layout.unchecked and far.layout.unchecked in far.layout.describe()
    assert real.layout.unchecked is None
    assert far.layout.has_post_norm == real.layout.has_post_norm
    # numbers that are not finite prove nothing, and later work says so itself
    module = tiny_module("llama")
    with torch.no_grad():
        module.model.layers[1].mlp.down_proj.weight.fill_(torch.nan)
    assert not explained(kt.load(module, tokenizer=byte_level_tokenizer()))[1].is_finite


def test_blocks_whose_change_is_below_the_rounding_of_the_dtype_are_said_to_be_unchecked():
    def loaded(dtype):
        module = tiny_module("llama")
        with torch.no_grad():
            module.model.embed_tokens.weight *= 1e4
        return kt.load(module.to(dtype), tokenizer=byte_level_tokenizer()).layout

    assert loaded(torch.float32).unchecked is None
    coarse = loaded(torch.bfloat16)
    assert coarse.unchecked == "the rounding of bfloat16 exceeds what 3 of 3 blocks change; load in float32"
    assert coarse.unchecked in coarse.describe()


def test_of_two_lists_of_blocks_that_beside_the_embedding_is_taken(tmp_path):
    from transformers import AutoModelForImageTextToText

    text = BASE | WIDE | GQA | SPECIAL | dict(model_type="llama")
    vision = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=28)
    config = CONFIG_MAPPING["llava"](text_config=text, vision_config=vision | dict(patch_size=14, projection_dim=32))
    module = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    model = kt.load(module, tokenizer=byte_level_tokenizer())
    assert model.layout.blocks == "model.language_model.layers"
    module.save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    assert kt.load(tmp_path, device="cpu").fingerprint() == model.fingerprint()


def test_several_residual_streams_are_refused_in_one_line():
    changes = dict(num_kv_shared_layers=0, layer_types=["full_attention"] * 3, laurel_rank=8, head_dim=8)
    changes |= dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=384)
    with pytest.raises(UnknownModel, match=r"one residual stream: a block gets \(4, 1, 2, 32\)") as caught:
        made("gemma3n_text", **changes, activation_sparsity_pattern=[0.0] * 3)
    assert "\n" not in str(caught.value)


def test_a_mixer_whose_rows_depend_on_their_padding_is_refused():
    with pytest.raises(UnknownModel, match="the numbers of a prompt change with the padding beside it"):
        made("recurrent_gemma", block_types=["recurrent"] * 3, lru_width=32)


@pytest.mark.parametrize(
    ("name", "changes", "paths"),
    [
        ("bloom", dict(n_layer=3, n_head=4), ("self_attention.dense", "mlp.dense_4h_to_h")),  # adds the stream itself
        ("mpt", dict(d_model=32, n_layers=3, n_heads=4, expansion_ratio=2), ("attn.out_proj", "ffn.down_proj")),
        ("ctrl", dict(n_layer=3, n_head=4, n_embd=32, dff=48), ("multi_head_attention.dense", "ffn.2")),
    ],
)
def test_older_families_are_read(name, changes, paths):
    model = made(name, **changes)
    assert (model.layout.w_attn, model.layout.w_mlp) == paths
    assert all(block.whole for block in explained(model))


@pytest.mark.parametrize("where", ["self_attn", "mlp", ""])
def test_a_linear_map_that_is_registered_last_and_not_called_is_not_taken(where):
    module = tiny_module("llama")
    for block in module.model.layers:
        block.get_submodule(where).add_module("gate", torch.nn.Linear(32, 32))
    layout = kt.load(module, tokenizer=byte_level_tokenizer()).layout
    assert (layout.w_attn, layout.w_mlp, layout.mlp) == ("self_attn.o_proj", "mlp.down_proj", "mlp")


def tied(module):
    module.model.layers[2].mlp.down_proj.weight = module.model.layers[0].mlp.down_proj.weight


def broken(module):
    module.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "words"),
    [(tied, "shares mlp.down_proj with model.layers.0, so that an edit of one"), (broken, "not finite")],
)
def test_weights_that_two_blocks_share_or_that_are_broken_are_refused(change, words):
    module = tiny_module("llama")
    change(module)
    with pytest.raises(UnknownModel, match=words):
        kt.load(module, tokenizer=byte_level_tokenizer())


def test_other_kinds_of_modules_are_refused_for_what_they_are():
    small = dict(vocab_size=384, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8, decoder_ffn_dim=8)
    both = BartForConditionalGeneration(BartConfig(**small, encoder_attention_heads=2, decoder_attention_heads=2))
    bert = BertLMHeadModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, is_decoder=True)
    )
    wrapped = torch.nn.DataParallel(torch.nn.Linear(2, 2))
    for module, words in ((both, "an encoder and a decoder"), (bert, "nnsight can read"), (wrapped, "model.module")):
        with pytest.raises(UnknownModel, match=words):
            kt.load(module, tokenizer=byte_level_tokenizer())
