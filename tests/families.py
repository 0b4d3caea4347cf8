"""Tiny random-weight models of every family, and two tokenizers: byte-level BPE and SentencePiece-style."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

import kt

TEXTS = (
    "The Space Needle is in the city of Seattle.",
    "The mother tongue of Danielle Darrieux is French; the capital of France is Paris.",
    "Megan Rapinoe plays the sport of soccer. Tomas Brill works as a chemist in Brunmar.",
    "The capital of {} is Rome, Italy. Therefore, because, I, You. São Paulo, Łódź, 東京.",
    "Marie Curie was born in Warsaw and lived in Paris. Her profession is that of a physicist.",
)
BASE = dict(num_hidden_layers=3, vocab_size=384, max_position_embeddings=128)
WIDE = dict(hidden_size=32, num_attention_heads=4, intermediate_size=48)
GQA = dict(num_key_value_heads=2)
OLD = dict(vocab_size=384, n_layer=3, n_embd=32, n_head=4, n_positions=128)
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": BASE | WIDE | GQA,
    "qwen3": BASE | WIDE | GQA | dict(head_dim=16),
    "llama": BASE | WIDE | GQA,
    "mistral": BASE | WIDE | GQA,
    "gemma2": BASE | WIDE | GQA | dict(head_dim=16, final_logit_softcapping=3.0, attn_logit_softcapping=5.0),
    "gemma3_text": BASE | WIDE | GQA | dict(head_dim=16, sliding_window=64),
    "gpt2": OLD,
    "gptj": OLD | dict(rotary_dim=4),
    "gpt_neox": BASE | WIDE,
    "phi": BASE | WIDE,
    "opt": BASE | dict(hidden_size=32, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32),
    "olmo2": BASE | WIDE | GQA,
}
FAMILIES = tuple(CONFIGS)
FUSED = {"phi3": BASE | WIDE | GQA}
"""Families for the tests of linear maps alone."""
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, head_dim=8)
EXPERTS = BASE | WIDE | GQA | dict(num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8)
MIXTURES = {
    "mixtral": EXPERTS | dict(num_local_experts=4),
    "qwen2_moe": EXPERTS | dict(num_experts=4, shared_expert_intermediate_size=24),
    "qwen3_moe": EXPERTS | dict(num_experts=4, mlp_only_layers=[0]),
    "deepseek_v3": EXPERTS
    | LATENT
    | dict(num_key_value_heads=4, n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1),
    "gpt_oss": EXPERTS | dict(num_local_experts=4),
    "llama4_text": EXPERTS
    | dict(num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=40, interleave_moe_layer_step=1),
}
"""Mixtures of experts: gated and plain shared ones, a dense first block, biases, transposed weights."""
STATE_SPACE = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8)
DELTA = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
HYBRIDS = {
    "qwen3_next": EXPERTS | DELTA | dict(num_experts=4, layer_types=["linear_attention", "full_attention"] * 2,
                                         num_hidden_layers=4, shared_expert_intermediate_size=16),
    "qwen3_5_text": BASE | WIDE | GQA | DELTA | dict(head_dim=8, layer_types=["linear_attention", "full_attention"] * 2,
                                                     num_hidden_layers=4),
    "lfm2": BASE | WIDE | GQA | dict(layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False),
    "jamba": EXPERTS | dict(num_experts=4, attn_layer_period=3, attn_layer_offset=1, expert_layer_period=2,
                            expert_layer_offset=1, mamba_d_state=8, use_mamba_kernels=False),
    "nemotron_h": EXPERTS | dict(layers_block_type=["mamba", "mlp", "attention", "moe"], num_hidden_layers=4,
                                 n_routed_experts=4, moe_shared_expert_intermediate_size=16, mamba_num_heads=8,
                                 mamba_head_dim=8, ssm_state_size=8, n_groups=2),
    "falcon_h1": BASE | WIDE | GQA | STATE_SPACE | dict(mamba_d_ssm=64, head_dim=8),
}  # fmt: skip
"""Layers of other mixers, two mixers side by side (Falcon-H1), one part a block (Nemotron-H)."""
SPECIAL = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)


@lru_cache(maxsize=1)
def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without BOS, as in GPT-2, GPT-J, Qwen2."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>"]
    core.train_from_iterator(
        TEXTS * 3,
        trainers.BpeTrainer(vocab_size=384, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")


@lru_cache(maxsize=1)
def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Unigram over metaspace words with byte fallback and a BOS, as in Llama and Mistral."""
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.Sequence([])
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    core.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    core.train_from_iterator(
        TEXTS * 3,
        trainers.UnigramTrainer(
            vocab_size=300,
            special_tokens=["<s>", "</s>", "<pad>", "<unk>"],
            unk_token="<unk>",
            show_progress=False,
        ),
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def tiny_module(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random model with weights large enough that its layers matter, the same in every version of transformers."""
    if family in HYBRIDS:  # 5.13 lets padding into linear attention and convolutions, which kt refuses; 5.17 masks it
        pytest.importorskip("transformers", minversion="5.17")
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**((CONFIGS | FUSED | MIXTURES | HYBRIDS)[family] | SPECIAL | changes))
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if family == "gpt2":  # how many numbers its initialization draws is up to the version
        torch.manual_seed(seed + 1)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.dim() > 1:
                embeds = ("embed" in name and "embed_out" not in name) or "wte" in name  # embed_out: an old lm_head
                weight.normal_(0, 0.5 if embeds else 0.5 / weight.shape[-1] ** 0.5)
            elif "bias" in name:
                weight.normal_(0, 0.1)
    return module.requires_grad_(False)


def wide_model(family: str, **changes: Any) -> kt.TracedModel:
    """In float64, in which torch multiplies no groups of experts at once."""
    module = tiny_module(family, **changes).double()
    module.set_experts_implementation("eager")
    return kt.load(module, tokenizer=byte_level_tokenizer())


def tiny_model(family: str, seed: int = 0, tokenizer: Any = None, **changes: Any) -> kt.TracedModel:
    return kt.load(tiny_module(family, seed, **changes), tokenizer=tokenizer or byte_level_tokenizer())
