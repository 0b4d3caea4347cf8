"""Every linear map of a block: named by what it does, read, written, restored, and its gradients those of autograd."""

import pytest
import torch
from families import FAMILIES, FUSED, byte_level_tokenizer, tiny_model, tiny_module

import kt
from kt.errors import KtError, UnknownSite
from kt.model.ndif import simulated
from kt.model.sites import Kind, Site
from kt.model.tokens import encode_ids, token_ids
from kt.model.update import LowRank

PROMPTS = ["The Space Needle is in the city of", "Paris", "The mother tongue of Danielle Darrieux is"]
QKV = ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj"]
GATED = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
PLAIN = ["mlp.up_proj", "mlp.down_proj"]
ROLES = {
    "gpt2": ["attn.c_attn", "attn.o_proj", *PLAIN],
    "gpt_neox": ["attn.query_key_value", "attn.o_proj", *PLAIN],
    "phi3": ["attn.qkv_proj", "attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"],
    **dict.fromkeys(["gptj", "phi", "opt"], QKV + PLAIN),
}


@pytest.fixture(params=[*FAMILIES, *FUSED])
def family(request):
    return request.param


def all_sites(model):
    return [Site(role, layer) for layer in range(model.n_layers) for role in model.layout.linears]


def test_every_family_names_its_maps_in_the_order_of_a_forward(family):
    linears = tiny_model(family).layout.linears
    assert list(linears) == ROLES.get(family, QKV + GATED)
    assert len(set(linears.values())) == len(linears)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_roles_do_not_depend_on_the_dtype(family, dtype):
    model = kt.load(tiny_module(family).to(dtype), tokenizer=byte_level_tokenizer())
    assert list(model.layout.linears) == ROLES.get(family, QKV + GATED)


def test_input_times_weight_plus_bias_is_the_output_of_every_map(model):
    batch, sites = model.encode(PROMPTS), all_sites(model)
    keys, values = model.read(batch, reversed(sites), "key"), model.read(batch, sites)
    assert list(keys) == list(values) == sites
    for site in sites:
        bias = getattr(model.linear(site), "bias", None)
        expected = keys[site] @ model.weight(site).T + (0 if bias is None else bias)
        torch.testing.assert_close(values[site], expected, atol=1e-5, rtol=1e-5)
        assert model.weight(site).shape == (model.value_size(site), model.key_size(site))
        assert values[site].shape == (*batch.ids.shape, model.value_size(site))
        assert model.site_of(model.weight_name(site)) == site


def test_a_write_reaches_the_output_of_its_map_and_restored_brings_the_bytes_back(model):
    batch, whole = model.encode(PROMPTS[:1]), model.fingerprint()
    logits = model.logits(batch)
    for site in (Site(role, 1) for role in model.layout.linears):
        draw = torch.Generator().manual_seed(0)
        left = torch.randn(model.value_size(site), 2, generator=draw)
        update = LowRank(left, torch.randn(2, model.key_size(site), generator=draw))
        key, value = model.read(batch, [site], "key")[site], model.read(batch, [site])[site]
        with model.restored([site]):
            assert list(model.copies([site])) == [model.weight_name(site)]
            model.write(site, update)
            moved = model.read(batch, [site])[site] - value
            torch.testing.assert_close(moved, key @ update.dense().T, atol=1e-4, rtol=1e-4)
            assert not torch.equal(model.logits(batch), logits)
        assert model.fingerprint() == whole


def answers_loss(logits):
    """Minus the summed log-probabilities of two tokens a row."""
    return -logits.log_softmax(-1)[:, :, 5].sum()


def test_gradients_times_inputs_add_up_to_the_weight_gradients_of_autograd(family):
    model = kt.load(tiny_module(family).double(), tokenizer=byte_level_tokenizer())
    rows = [token_ids(model.tokenizer, prompt)[:6] for prompt in PROMPTS if len(prompt) > 10]
    batch, sites = encode_ids(rows, 0), all_sites(model)  # padded rows are not finite in a float64 Gemma 2
    found = model.linear_io(batch, reversed(sites), answers_loss, keep=2)
    assert list(found) == sites
    assert not any(p.requires_grad or p.grad is not None for p in model.module.parameters())
    weights = [model.own(site) for site in sites]
    for weight in weights:
        weight.requires_grad_(True)
    loss = answers_loss(model.module(**model.inputs(batch, 2)).logits[:, -2:])
    by_hand = torch.autograd.grad(loss, weights)
    for site, gradient in zip(sites, by_hand, strict=True):
        expected = gradient.T if family == "gpt2" else gradient
        keys, gradients = found[site]
        assert keys.dtype == gradients.dtype == torch.float64 and float(expected.abs().max()) > 1e-4
        total = torch.einsum("bpo,bpi->oi", gradients, keys)
        torch.testing.assert_close(total, expected, atol=1e-12, rtol=1e-9)


def test_gradients_do_not_depend_on_the_batch_or_on_how_positions_are_chosen(model):
    sites, batch = all_sites(model), model.encode(PROMPTS)
    last = torch.full((3,), batch.ids.shape[1] - 1)
    chosen = model.linear_io(batch, sites, answers_loss, at=(torch.arange(3), last))
    together = model.linear_io(batch, sites, answers_loss)
    values = model.read(batch, sites, "key")
    for row, prompt in enumerate(PROMPTS):
        alone = model.linear_io(model.encode([prompt]), sites, answers_loss)
        for site in sites:
            assert torch.equal(together[site].keys[row], values[site][row])
            assert not together[site].gradients[row, : -alone[site].keys.shape[1]].any()  # padding
            for one, three, full in zip(alone[site], chosen[site], together[site], strict=True):
                scale = float(one.abs().max())
                torch.testing.assert_close(one[0, -1], three[row], atol=1e-4 * scale, rtol=1e-4)
                torch.testing.assert_close(one[0], full[row, -one.shape[1] :], atol=1e-4 * scale, rtol=1e-4)


def renamed(module, names):
    """The module with its children under other names: the forward still finds them, a reader of names does not."""
    children = dict(module._modules)
    module._modules.clear()
    module._modules.update({names.get(name, name): child for name, child in children.items()})
    hidden = {old: property(lambda self, new=new: self._modules[new]) for old, new in names.items()}
    module.__class__ = type(f"Renamed{type(module).__name__}", (type(module),), hidden)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "olmo2", "gptj", "phi", "opt"])
def test_roles_come_from_the_numbers_not_from_the_names(family):
    plain, module = tiny_model(family), tiny_module(family)
    for block in module.get_submodule(plain.layout.blocks):
        attention = block.get_submodule(plain.layout.attn)
        renamed(attention, {"q_proj": "k_proj_", "k_proj": "v_proj_", "v_proj": "q_proj_"})
        if "mlp.gate_proj" in plain.layout.linears:
            renamed(block.mlp, {"gate_proj": "one", "up_proj": "two"})
    model = kt.load(module, tokenizer=byte_level_tokenizer())
    assert list(model.layout.linears) == list(plain.layout.linears)
    for site in all_sites(model):
        assert torch.equal(model.weight(site), plain.weight(site))
    assert not all(path in plain.layout.linears.values() for path in model.layout.linears.values())


def test_a_remote_model_names_and_reads_the_same_maps(family):
    real = tiny_model(family)
    remote = simulated(real)
    assert remote.layout.linears == real.layout.linears
    batch, sites = real.encode(PROMPTS), all_sites(real)
    for end in ("key", "value"):
        here, there = real.read(batch, sites, end), remote.read(batch, sites, end)
        assert all(torch.equal(here[site], there[site]) for site in sites)
    with pytest.raises(KtError, match="remote"):
        remote.linear_io(batch, sites[:1], answers_loss)


def test_a_kind_alone_is_the_output_projection():
    assert Site(Kind.MLP, 3) == Site("mlp", 3) == Site("mlp.down_proj", 3) == Site(Kind.MLP, 3, "down_proj")
    assert Site(Kind.ATTN, 3) == Site("attn.o_proj", 3) and Site(Kind.ATTN, 3) != Site("attn.q_proj", 3)
    assert {Site(Kind.MLP, 3): 1}[Site("mlp.down_proj", 3)] == 1
    assert [str(Site(kind, 3)) for kind in Kind] == ["hidden.3", "attn.3", "mlp.3"]
    for site in (Site(Kind.RESID, 1), Site(Kind.ATTN, 12), Site("mlp.up_proj", 3), Site("attn.inner.q", 0)):
        assert Site.parse(str(site)) == site
    assert str(Site("mlp.up_proj", 3)) == "mlp.up_proj.3" and Site("mlp.up_proj", 3).kind is Kind.MLP
    assert sorted([Site("mlp.up_proj", 1), Site(Kind.MLP, 2), Site(Kind.MLP, 1), Site(Kind.ATTN, 5)]) == [
        Site(Kind.ATTN, 5), Site(Kind.MLP, 1), Site("mlp.up_proj", 1), Site(Kind.MLP, 2),
    ]  # fmt: skip


def test_a_map_goes_by_its_role_its_own_name_or_its_path():
    gpt2, opt = tiny_model("gpt2"), tiny_model("opt")
    assert gpt2.site("mlp.c_fc", 1) == gpt2.site("mlp.up_proj", 1) == Site("mlp.up_proj", 1)
    assert gpt2.site("mlp.c_proj", 1) == gpt2.site("mlp", 1) == Site(Kind.MLP, 1)
    assert gpt2.site("attn.c_proj", 1) == Site(Kind.ATTN, 1) and gpt2.site("hidden", 1) == Site(Kind.RESID, 1)
    assert opt.site("fc1", 2) == opt.site("mlp.fc1", 2) == Site("mlp.up_proj", 2)
    assert opt.site("self_attn.q_proj", 0) == Site("attn.q_proj", 0)
    assert gpt2.weight_name(Site("mlp.c_fc", 1)) == "transformer.h.1.mlp.c_fc.weight"
    batch = gpt2.encode(PROMPTS)
    alias, site = Site("mlp.c_fc", 1), Site("mlp.up_proj", 1)
    assert torch.equal(gpt2.read(batch, [alias])[alias], gpt2.read(batch, [site])[site])


def test_a_wrong_name_is_one_line_with_those_that_exist():
    llama = tiny_model("llama")
    for bad, words in (
        (lambda: llama.site("mlp.upproj", 1), "did you mean mlp.up_proj"),
        (lambda: llama.site("mlp.c_fc", 1), "mlp.gate_proj, mlp.up_proj, mlp.down_proj"),
        (lambda: llama.site("mlp.up_proj", 3), "layers 0 to 2"),
        (lambda: llama.projection("attn.qproj", 0), "did you mean attn.q_proj"),
        (lambda: llama.weight(Site("attn.c_attn", 0)), "attn.q_proj, attn.k_proj"),
        (lambda: llama.linear_io(llama.encode(PROMPTS), [Site(Kind.RESID, 0)], answers_loss), "no weight"),
        (lambda: llama.site_of("model.norm.weight"), "no linear map"),
        (lambda: llama.site_of("model.layers.7.mlp.up_proj.weight"), "no linear map"),
        (lambda: Site("up_proj", 1), "mlp.up_proj"),
        (lambda: Site("hidden.up_proj", 1), "residual stream"),
        (lambda: Site.parse("mlp.up_proj"), "mlp.up_proj.5"),
    ):
        with pytest.raises(UnknownSite, match=words) as caught:
            bad()
        assert "\n" not in str(caught.value)


def test_a_block_without_the_map_is_named():
    module = tiny_module("llama")
    module.model.layers[2].mlp = torch.nn.Sequential()
    module.model.layers[2].mlp.add_module("down_proj", torch.nn.Linear(32, 32))
    model = kt.load(module, tokenizer=byte_level_tokenizer())
    assert model.site("mlp.up_proj", 1) == Site("mlp.up_proj", 1)
    with pytest.raises(UnknownSite, match=r"block 2 .* has no mlp\.up_proj"):
        model.site("mlp.up_proj", 2)
