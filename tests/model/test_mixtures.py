"""A mixture of experts is one linear map: its key holds the gated keys of all parts, its weight theirs side by side."""

import re

import pytest
import torch
from families import MIXTURES, byte_level_tokenizer, tiny_model, tiny_module, wide_model

import kt
from kt.errors import UnknownModel, UnknownSite
from kt.model.ndif import simulated
from kt.model.sites import Site

FACT = "The Space Needle is in the city of"
SHARED = {"qwen2_moe", "deepseek_v3", "llama4_text"}


@pytest.fixture(params=MIXTURES)
def kind(request):
    return request.param


def read(model, site, end):
    return model.read(model.encode([FACT]), [site], end)[site][0]


def test_the_key_times_the_weight_is_the_output(kind):
    model, site = wide_model(kind), Site("mlp", 2)
    key, value = read(model, site, "key"), read(model, site, "value")
    left = value - key @ model.weight(site).T
    if kind == "gpt_oss":  # the experts' biases, weighed by the router
        module = model.module.model.layers[2].mlp.experts
        pairs = read_of_inputs(model, "model.layers.2.mlp.experts")
        gates = torch.zeros(len(key), 4, dtype=key.dtype).scatter(1, pairs[1], pairs[2])
        left = left - gates @ module.down_proj_bias
    assert key.shape[1] == model.key_size(site) == model.weight(site).shape[1]
    assert left.abs().max() < 1e-12 * value.abs().max()


def read_of_inputs(model, path):
    with model.nnsight.trace(**model.inputs(model.encode([FACT]))) as tracer:
        found = [each.clone() for each in model.envoy(path).inputs[0]]
        found.save()
        tracer.stop()
    return found


def test_the_parts_make_up_the_whole(kind):
    model, site = wide_model(kind), Site("mlp", 2)
    whole, parts = read(model, site, "key"), model.parts(site)
    assert next(str(part) for part in parts) == "mlp.experts.0.2" and len(parts) == len(model.weight_names(site))
    assert any("shared" in str(part) for part in parts) == (kind in SHARED)
    for part, columns in parts.items():
        assert torch.equal(read(model, part, "key"), whole[:, columns])
        assert torch.equal(model.weight(part), model.weight(site)[:, columns])
        assert model.site_of(model.weight_name(part)) == part and model.whole(part) == site
        assert torch.equal(read(model, part, "value"), whole[:, columns] @ model.weight(part).T)
    sent = [bool(read(model, part, "key").any(-1).all()) for part in parts if model.is_expert(part)]
    assert not all(sent)  # no token is sent to every expert
    together = model.read(model.encode([FACT]), [*parts, site, Site("attn", 2), Site("hidden", 2)], "value")
    assert torch.equal(together[site][0], read(model, site, "value"))


def test_a_trace_that_does_nothing_is_the_plain_forward_bit_for_bit(kind):
    model = tiny_model(kind)
    batch = model.encode([FACT])
    with torch.no_grad():
        plain = model.module(**model.inputs(batch)).logits
    assert torch.equal(model.logits(batch), plain)


def test_one_slice_is_written_and_comes_back_to_the_byte(kind):
    model, part = tiny_model(kind), Site("mlp.experts.1", 2)
    before = model.fingerprint()
    others = {name: model.fingerprint([name]) for name in model.weight_names(Site("mlp", 2))}
    name = model.weight_name(part)
    assert re.fullmatch(r"model\.layers\.2\.(mlp|feed_forward)\.experts\.down_proj\[1\]", name)
    with model.restored([part]):
        change = torch.randn(model.value_size(part), model.key_size(part))
        was = model.weight(part).clone()
        model.write(part, change)
        assert torch.allclose(model.weight(part), was + change)
        assert {n for n in others if model.fingerprint([n]) != others[n]} == {name}
    assert model.fingerprint() == before
    with model.restored([Site("mlp", 2)]):
        model.write(Site("mlp", 2), torch.ones(model.d_model, model.key_size(Site("mlp", 2))))
        assert all(model.fingerprint([n]) != others[n] for n in others)
    assert model.fingerprint() == before


def test_the_layout_says_where_experts_are(kind):
    layout = tiny_model(kind).layout
    count = 2 if kind == "llama4_text" else 4
    assert f"{count} experts{' and 1 shared' * (kind in SHARED)} at " in layout.describe()
    if kind in ("qwen3_moe", "deepseek_v3"):
        assert layout.at(0).mixture is None and layout.at(1).mixture is not None
        assert "mlp.down_proj (layers 0) and " in layout.describe()


def test_what_is_no_single_map_is_refused_in_one_line():
    model = tiny_model("qwen3_moe")
    absent = {("mlp.experts.7", 2): "no linear map", ("mlp.experts.0", 0): "has no mlp.experts.0; it has .*, others do"}
    for wrong, words in absent.items():
        with pytest.raises(UnknownSite, match=words):
            model.site(*wrong)
    with pytest.raises(UnknownSite, match="is a mixture of experts, which has no one linear map"):
        model.linear(Site("mlp", 2))
    with pytest.raises(UnknownSite, match=r"no weight called .*down_proj\[9\]"):
        model.own("model.layers.2.mlp.experts.down_proj[9]")
    with pytest.raises(UnknownModel, match="mixture of experts is read on a model that runs here"):
        simulated(model)


def test_a_mixture_in_float64_is_told_what_to_do(tmp_path):
    module = tiny_module("mixtral").double()
    with pytest.raises(UnknownModel, match=r"; in float64 call its set_experts_implementation\('eager'\) first"):
        kt.load(module, tokenizer=byte_level_tokenizer())
    module.save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    assert kt.load(tmp_path, dtype="float64", device="cpu").dtype is torch.float64


def test_experts_whose_output_is_not_their_weights_times_their_keys_are_refused():
    module = tiny_module("mixtral")
    own = type(module.model.layers[1].mlp.experts)._apply_gate
    module.model.layers[1].mlp.experts._apply_gate = lambda hidden: own(module.model.layers[1].mlp.experts, hidden) * 2
    module.model.layers[1].mlp.experts.forward = lambda *given: 3.0 * given[0]
    with pytest.raises(UnknownModel, match=r"4 experts at mlp.experts of model.layers.1 do not make its output: \d"):
        kt.load(module, tokenizer=byte_level_tokenizer())


def test_the_router_is_read(kind):
    model = tiny_model(kind)
    gates = model.routing(model.encode([FACT, "The"]), [2])[2]
    count = model.layout.at(2).mixture.count
    assert gates.shape == (2, len(model.encode([FACT]).ids[0]), count)
    sent = (gates != 0).sum(-1)
    assert int(sent.max()) == (1 if kind == "llama4_text" else 2) == int(sent[0].min())
    if kind in ("mixtral", "gpt_oss"):  # whose weights are a softmax over the chosen
        assert torch.allclose(gates.sum(-1), torch.ones(()), atol=1e-6)
    with pytest.raises(UnknownSite, match="has no mixture of experts"):
        tiny_model("llama").routing(model.encode([FACT]), [1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_of_16_bits_are_proved_within_their_rounding(kind, dtype):
    model = kt.load(tiny_module(kind).to(dtype), tokenizer=byte_level_tokenizer())
    assert model.mixture_of(Site("mlp", 2)) is not None
    broken = tiny_module(kind).to(dtype)
    experts = broken.get_submodule(f"model.layers.2.{model.layout.at(2).mixture.experts}")
    own = experts.forward
    experts.forward = lambda *inputs, **named: own(*inputs, **named) * 1.5
    with pytest.raises(UnknownModel, match="do not make its output"):
        kt.load(broken, tokenizer=byte_level_tokenizer())


@pytest.mark.parametrize("part", ["mlp", "mlp.experts", "mlp.shared_expert", "down_proj"])
def test_experts_that_two_blocks_share_are_refused(part):
    module = tiny_module("qwen2_moe")
    one, other = module.model.layers[1:]
    if part == "down_proj":
        other.mlp.experts.down_proj = one.mlp.experts.down_proj
    else:
        other.set_submodule(part, one.get_submodule(part))
    with pytest.raises(UnknownModel, match="so that an edit of one would be an edit of both"):
        kt.load(module, tokenizer=byte_level_tokenizer())
