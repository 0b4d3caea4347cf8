"""What kt reads, edits and refuses: tiny random models of transformers' own list of kinds.

    python benchmarks/reliability/families.py  # a few CPU minutes; writes docs/data/families.json
    python benchmarks/reliability/families.py --only llama,jamba  # some of them, printed and not kept
    python benchmarks/reliability/families.py --table  # the file as a table

A kind is *read* if `kt.load` takes it and a fact is traced with finite numbers, and *edited* if a joint edit is solved,
changes the prediction and is taken back to the byte. Everything else must be a refusal of one line; the last column
has it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
import transformers  # noqa: E402
from editing_help import solve  # noqa: E402
from families import TEXTS, byte_level_tokenizer  # noqa: E402
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText  # noqa: E402

import kt  # noqa: E402
from kt._util.data import to_json  # noqa: E402
from kt.errors import KtError  # noqa: E402
from kt.facts.corpus import Corpus  # noqa: E402
from kt.model.sites import Kind  # noqa: E402

OUT = ROOT / "docs" / "data" / "families.json"
SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
SIZES |= dict(vocab_size=384, max_position_embeddings=128, head_dim=8, bos_token_id=0, eos_token_id=1, pad_token_id=2)
SIZES |= dict(n_layer=3, n_embd=32, n_head=4, n_positions=128, ffn_dim=48, word_embed_proj_dim=32, decoder_layers=3)
SIZES |= dict(d_model=32, n_layers=3, n_heads=4, num_layers=3, decoder_attention_heads=4, decoder_ffn_dim=48)
SIZES |= dict(num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
SIZES |= dict(
    shared_intermediate_size=16, shared_expert_intermediate_size=16, d_ff=48, encoder_layers=2, rotary_dim=4, dff=48
)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
LATENT |= dict(num_key_value_heads=4, head_dim=8)
DELTA = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
SSM = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8)
PLAIN = """
llama mistral ministral qwen2 qwen3 gemma gemma2 gemma3_text vaultgemma phi phi3 gpt2 gpt-sw3 gptj gpt_neox
gpt_neox_japanese gpt_bigcode codegen opt xglm biogpt openai-gpt ctrl bloom mpt olmo olmo2 olmo3 stablelm
starcoder2 cohere cohere2 granite smollm3 helium glm glm4 nemotron persimmon ernie4_5 exaone4 internlm3 arcee
apertus seed_oss hunyuan_v1_dense modernbert-decoder nanochat bitnet diffllama doge mixtral qwen2_moe qwen3_moe
glm4_moe ernie4_5_moe granitemoe granitemoeshared hunyuan_v1_moe olmoe phimoe gpt_oss jetmoe minimax_m2
exaone_moe flex_olmo cohere2_moe afmoe mamba falcon_mamba recurrent_gemma rwkv
minimax xlstm bart xlm
"""
"""Kinds that need no other changes than the sizes."""
KINDS: dict[str, dict] = {kind: {} for kind in PLAIN.split()}
KINDS |= {
    "granite": dict(residual_multiplier=0.22),
    "lfm2 (convolutions alone)": dict(layer_types=["conv"] * 3, conv_dim=32),
    "granitemoehybrid (Mamba and dense)": SSM
    | dict(layer_types=["mamba"] * 3, shared_intermediate_size=48, num_local_experts=0),
    "bert": dict(is_decoder=True),
    "xlm-roberta": dict(is_decoder=True),
    "longcat_flash": LATENT | dict(num_hidden_layers=None, n_shared_experts=1),
    "lfm2": dict(layer_types=["conv", "full_attention", "conv"], conv_dim=32),
    "falcon": dict(head_dim=None, num_kv_heads=4),
    "falcon (sequential)": dict(head_dim=None, num_kv_heads=4, parallel_attn=False, alibi=True),
    "falcon (new decoder)": dict(head_dim=None, num_kv_heads=2, new_decoder_architecture=True),
    "stablelm (norms on q and k)": dict(qk_layernorm=True),
    "stablelm (parallel)": dict(use_parallel_residual=True),
    "opt (norm behind the sum)": dict(do_layer_norm_before=False),
    "gpt_neo": dict(num_layers=3, attention_types=[[["global"], 3]], num_heads=4),
    "minicpm3": LATENT,
    "deepseek_v2": LATENT | dict(first_k_dense_replace=0, n_shared_experts=1),
    "deepseek_v3": LATENT | dict(first_k_dense_replace=0, n_shared_experts=1, n_group=2, topk_group=1),
    "deepseek_v3 (first block dense)": LATENT | dict(first_k_dense_replace=1, n_group=2, topk_group=1),
    "llama4_text": dict(intermediate_size_mlp=48, interleave_moe_layer_step=1, num_local_experts=2),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
        ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2),
    ),
    "qwen3_next": DELTA | dict(layer_types=["linear_attention", "full_attention", "linear_attention"]),
    "qwen3_5_text": DELTA | dict(layer_types=["linear_attention", "full_attention", "linear_attention"]),
    "qwen3_5_moe_text": DELTA | dict(layer_types=["linear_attention", "full_attention", "linear_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention", "conv"], num_dense_layers=1),
    "jamba": dict(attn_layer_period=3, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
                  use_mamba_kernels=False),
    "falcon_h1": SSM | dict(mamba_d_ssm=64),
    "bamba": SSM | dict(attn_layer_indices=[1]),
    "granitemoehybrid": SSM | dict(layer_types=["mamba", "attention", "mamba"], shared_intermediate_size=48),
    "mamba2": dict(num_heads=8, head_dim=8, n_groups=1, state_size=8),
    "nemotron_h": dict(
        mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=2, moe_shared_expert_intermediate_size=16,
        layers_block_type=["mamba", "mlp", "attention", "moe"], num_hidden_layers=4,
    ),
    "olmo_hybrid": DELTA | dict(layer_types=["linear_attention", "full_attention", "linear_attention"]),
    "deepseek_v32": LATENT | dict(first_k_dense_replace=1, n_group=2, topk_group=1),
    "glm4_moe_lite": LATENT | dict(n_group=2, topk_group=1),
    "zamba2": dict(layers_block_type=["mamba", "hybrid", "mamba"], mamba_headdim=8, n_mamba_heads=8),
    "gemma3n_text": dict(
        num_kv_shared_layers=0, layer_types=["full_attention"] * 3, laurel_rank=8, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=384, activation_sparsity_pattern=[0.0] * 3,
    ),
}  # fmt: skip
VISION = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=28)
VISION |= dict(patch_size=14, projection_dim=32, depth=3, embed_dim=32, num_heads=4)
WRAPPERS = {"gemma3": "gemma3_text", "llava": "llama", "qwen2_vl": "qwen2_vl_text", "mistral3": "mistral"}
"""Multimodal kinds and their text models; the vision tower has as many layers as the text model."""


def config_of(kind, **changes):
    """The kind's configuration with every size that it knows made small."""
    kind = kind.split(" (")[0]
    known = CONFIG_MAPPING[kind]()
    sizes = {name: value for name, value in SIZES.items() if hasattr(known, name)} | changes
    return CONFIG_MAPPING[kind](**{name: value for name, value in sizes.items() if value is not None})


def wrapper_of(kind):
    text = {name: value for name, value in SIZES.items() if hasattr(CONFIG_MAPPING[WRAPPERS[kind]](), name)}
    text["model_type"] = WRAPPERS[kind]
    if kind == "qwen2_vl":  # how many of a head's four frequencies turn with time, height and width
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = CONFIG_MAPPING[kind](text_config=text, vision_config=VISION, image_token_id=383, image_token_index=383)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


def tiny(kind):
    """A random model with weights large enough that its layers matter."""
    torch.manual_seed(0)
    make = wrapper_of if kind in WRAPPERS else lambda kind: AutoModelForCausalLM.from_config(
        config_of(kind, **KINDS[kind]), dtype=torch.float32
    )  # fmt: skip
    module = make(kind).eval()
    with torch.no_grad():
        for weight in module.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.5 / weight.shape[-1] ** 0.5)
    return module


def tried(kind, text, folder):
    """One row: read, edited, and what was said."""
    row = {"kind": kind, "read": False, "edited": False}
    try:
        module = tiny(kind)
    except Exception as error:  # not kt's: this version of transformers does not make it so
        return row | {"class": "", "says": f"not made: {type(error).__name__}: {error}".splitlines()[0][:200]}
    row["class"] = type(module).__name__
    try:
        model = kt.load(module, tokenizer=byte_level_tokenizer())
        row["says"] = model.layout.describe()
        fact = kt.Fact("The {} is in the city of", "Space Needle", answer="Paris", foil="Rome", target="Rome")
        kinds = [kind for kind in ("mlp", "attn") if model.layers_with(Kind(kind))]
        trace = kt.causal_trace(model, [fact], kinds=kinds, samples=1, keep="all")
        row["read"] = bool(torch.tensor([trace.facts[0].p_clean, trace.facts[0].p_corrupt]).isfinite().all())
        before = model.fingerprint()
        mixing, mlps = ([*model.layers_with(kind)] for kind in (Kind.ATTN, Kind.MLP))
        edit = solve(
            model, Corpus.open(text), folder / kind, layers_mlp=tuple(mlps[:2]), layers_attn=tuple(mixing[1:2])
        )
        was = model.logits(model.encode([fact.prompt]))
        with edit.applied(model):
            moved = not torch.equal(was, model.logits(model.encode([fact.prompt])))
        row["edited"] = moved and model.fingerprint() == before
    except KtError as error:
        row["says"] = str(error)
    except Exception as error:
        row["says"] = f"CRASH {type(error).__name__}: {error}".splitlines()[0][:300]
    return row


def table(held):
    yes = {True: "yes", False: "no"}
    rows = ["| kind | class | read | edited | what was found, or why not |", "| --- | --- | --- | --- | --- |"]
    for row in held["kinds"]:
        shown = (row["kind"], row["class"], yes[row["read"]], yes[row["edited"]], row["says"].replace("|", "\\|"))
        rows.append("| " + " | ".join(shown) + " |")
    n = len(held["kinds"])
    counts = [sum(row[name] for row in held["kinds"]) for name in ("read", "edited")]
    rows += ["", f"{n} kinds of transformers {held['transformers']}: {counts[0]} read, {counts[1]} edited."]
    return "\n".join(rows) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the file as a table, and stop")
    parser.add_argument("--only", help="some kinds, by comma; printed, and the file stays")
    asked = parser.parse_args()
    if asked.table:
        sys.stdout.write(table(json.loads(OUT.read_text(encoding="utf-8"))))
        return 0
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    kinds = asked.only.split(",") if asked.only else [*KINDS, *WRAPPERS]
    rows = []
    with tempfile.TemporaryDirectory() as place:
        text = Path(place) / "corpus.txt"
        text.write_text("\n".join(TEXTS * 30))
        for kind in kinds:
            rows.append(tried(kind, text, Path(place)))
            sys.stderr.write(f"{kind}: read {rows[-1]['read']}, edited {rows[-1]['edited']}: {rows[-1]['says']}\n")
    held = {"kinds": rows, "transformers": transformers.__version__}
    if not asked.only:
        OUT.write_text(to_json(held), encoding="utf-8")
    sys.stdout.write(table(held))
    return int(any(row["says"].startswith("CRASH") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
