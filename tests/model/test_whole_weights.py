"""Weights that are not the whole of a layer, and prompts that a model cannot read, are found before any work."""

import pytest
import torch
from families import byte_level_tokenizer, tiny_model, tiny_module

import kt
from kt.errors import BadFact, UnknownModel

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


def test_a_token_beyond_the_embedding_is_left_out_by_name():
    model = tiny_model("gpt2", vocab_size=330)
    ids = model.tokenizer(FACT.prompt)["input_ids"]
    assert max(ids) >= 330, ids
    plain = kt.Fact("a {} (", "c", answer="d", foil="e", id="plain")
    trace = kt.causal_trace(model, [FACT, plain], samples=1, keep="all")
    assert [fact.id for fact in trace.left_out] == ["short"]
    assert "the embedding has 330 rows" in trace.left_out[0].reason
