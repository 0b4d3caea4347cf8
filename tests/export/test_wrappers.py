"""An edit of a multimodal model's text part is written back into the whole model's folder."""

import json
import warnings

import pytest
import torch
from edits_by_hand import random_edit
from families import byte_level_tokenizer
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

import kt
from kt.cli import main
from kt.export import to_hf, to_peft
from kt.export.undo import revert_folder

TEXT = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
TEXT |= dict(vocab_size=384, max_position_embeddings=128, head_dim=8, bos_token_id=0, eos_token_id=1, pad_token_id=2)
VISION = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=28)
VISION |= dict(patch_size=14, projection_dim=32, depth=2, embed_dim=32, num_heads=4, out_hidden_size=32, head_dim=8)
VISION |= dict(fullatt_block_indexes=[1], deepstack_visual_indexes=[0], num_position_embeddings=16)
VISION |= dict(vision_output_dim=32, num_key_value_heads=4)
KINDS = {
    "gemma3": dict(mm_tokens_per_image=4),
    "internvl": {},
    "mistral3": {},
    "mllama": {},  # AutoModelForCausalLM has it as its text part alone
    "qwen2_5_vl": {},
}
PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
FACT = kt.Fact("The {} is in the city of", "Space Needle", answer="Paris", foil="Rome", target="Rome")


def small(config, sizes):
    held = config.to_dict()
    return {"model_type": config.model_type} | {k: v for k, v in sizes.items() if k in held and held[k] is not None}


def folder_of(kind, folder):
    """A tiny random model of a kind as save_pretrained writes it, with a processor's files beside it."""
    torch.manual_seed(0)
    known = CONFIG_MAPPING[kind]()
    text = small(known.get_text_config(), TEXT)
    if kind.startswith("qwen"):
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    vision = small(known.vision_config, VISION)
    if kind == "internvl":
        vision |= dict(image_size=[28, 28], patch_size=[14, 14])
    ids = dict(image_token_id=383, image_token_index=383, video_token_id=382)
    config = CONFIG_MAPPING[kind](text_config=text, vision_config=vision, **ids, **KINDS.get(kind, {}))
    module = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.5 / weight.shape[-1] ** 0.5)
    module.save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    for name in PROCESSOR:
        (folder / name).write_text(json.dumps({"of": name}))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_wrapper_is_the_whole_model_with_its_processor_and_comes_back_to_the_byte(kind, tmp_path):
    source = folder_of(kind, tmp_path / "source")
    model = kt.load(source)
    names = [model.weight_name(kt.Site("mlp", 1)), model.weight_name(kt.Site("attn", 2))]
    edit = random_edit(model, names)
    merged = to_hf(model, edit, tmp_path / "merged").path
    before, after = load_file(source / "model.safetensors"), load_file(merged / "model.safetensors")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert before.keys() == after.keys() and len(changed) == 2 and not any("vi" in name for name in changed)
    for name in (*PROCESSOR, "chat_template.jinja"):
        assert (merged / name).read_text() == (source / name).read_text()
    config, was = (json.loads((folder / "config.json").read_text()) for folder in (merged, source))
    assert all(config[part] == was[part] for part in ("architectures", "model_type"))
    whole, ids = AutoModelForImageTextToText.from_pretrained(merged), torch.tensor([[5, 6, 7]])
    assert type(whole).__name__ == json.loads((source / "config.json").read_text())["architectures"][0]
    with edit.applied(model), torch.no_grad():
        want = model.module(input_ids=ids).logits
        assert torch.allclose(whole(input_ids=ids).logits, want, atol=1e-5)
    for number, base in enumerate((None, str(source))):
        back = revert_folder(merged, base=base, to=tmp_path / f"back-{number}").path
        again = load_file(back / "model.safetensors")
        assert all(torch.equal(before[name], again[name]) for name in before)
    if kind in ("gemma3", "qwen2_5_vl"):
        peft = pytest.importorskip("peft")
        adapter = to_peft(model, edit, tmp_path / "adapter").path
        bare = AutoModelForImageTextToText.from_pretrained(source)
        with torch.no_grad():
            got = peft.PeftModel.from_pretrained(bare, adapter)(input_ids=ids).logits
        assert torch.allclose(got, want, atol=1e-5)


def test_the_command_merges_into_a_wrappers_folder_of_several_files(tmp_path):
    source = folder_of("llava", tmp_path / "source")
    model = kt.load(source)
    model.module.save_pretrained(source, max_shard_size="60KB")
    (source / "model.safetensors").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        edit = kt.edit(kt.load(source), FACT, method="ft", layers_mlp=(1,), num_steps=2).save(
            tmp_path / "e.safetensors"
        )
        assert main(["export", str(edit), "-m", str(source), "--to", str(tmp_path / "merged")]) == 0
    files = sorted(path.name for path in source.glob("*.safetensors"))
    assert len(files) > 1 and files == sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
