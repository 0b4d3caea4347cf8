"""The handle on every family: reading changes nothing, sites mean what they say, weights come back exactly."""

import pytest
import torch
from families import FAMILIES, byte_level_tokenizer, sentencepiece_tokenizer, tiny_model, tiny_module

import kt
from kt.errors import KtError, UnknownModel, UnknownSite
from kt.model.sites import Kind, Site
from kt.model.tokens import encode
from kt.model.update import LowRank

PROMPTS = ["The Space Needle is in the city of", "Paris", "The mother tongue of Danielle Darrieux is"]


def plain(model, text, **extra):
    batch = encode(model.tokenizer, [text])
    with torch.no_grad():
        return model.module(input_ids=batch.ids, **extra).logits


def test_noop_trace_is_bitwise_the_plain_forward(model):
    for text in PROMPTS:
        ids = encode(model.tokenizer, [text]).ids
        with torch.no_grad(), model.nnsight.trace(input_ids=ids):
            out = model.nnsight.output.logits.save()
        assert torch.equal(out, plain(model, text))


def test_patching_a_site_with_its_own_value_changes_nothing(model):
    batch = encode(model.tokenizer, PROMPTS[:1])
    sites = [Site(kind, layer) for kind in Kind for layer in range(model.n_layers)]
    values = model.read(batch, sites)
    with torch.no_grad(), model.nnsight.trace(**model.inputs(batch)):
        for layer in range(model.n_layers):
            model.value(Site(Kind.ATTN, layer), 1)[:] = values[Site(Kind.ATTN, layer)]
            model.value(Site(Kind.MLP, layer), 1)[:] = values[Site(Kind.MLP, layer)]
            model.set_hidden(layer, values[Site(Kind.RESID, layer)])
        out = model.last_logits().save()
    assert torch.equal(out.float(), model.logits(batch))


def test_patching_a_site_with_zeros_changes_the_output(model):
    batch = encode(model.tokenizer, PROMPTS[:1])
    before = model.logits(batch)[:, 0]
    for kind in (Kind.ATTN, Kind.MLP):
        with torch.no_grad(), model.nnsight.trace(**model.inputs(batch)):
            model.value(Site(kind, 1), 1)[:] = 0
            out = model.nnsight.output.logits.save()
        assert (out[:, -1] - before).abs().max() > 1e-4


def test_weight_times_key_plus_bias_is_the_value(model):
    batch = encode(model.tokenizer, PROMPTS[:1])
    for kind in (Kind.ATTN, Kind.MLP):
        for layer in range(model.n_layers):
            site = Site(kind, layer)
            key, value = model.read(batch, [site], "key")[site], model.read(batch, [site])[site]
            bias = getattr(model.linear(site), "bias", None)
            expected = key @ model.weight(site).T + (0 if bias is None else bias)
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
            assert model.weight(site).shape == (model.d_model, model.key_size(site)) == (model.d_model, key.shape[-1])


def test_left_padded_rows_give_the_numbers_of_single_rows(model):
    together = model.logits(encode(model.tokenizer, PROMPTS))[:, 0]
    for row, text in zip(together, PROMPTS, strict=True):
        torch.testing.assert_close(row, plain(model, text)[0, -1], atol=2e-5, rtol=1e-4)


def test_unembed_of_the_last_hidden_state_is_the_models_output(model):
    batch = encode(model.tokenizer, PROMPTS)
    last = Site(Kind.RESID, model.n_layers - 1)
    hidden = model.read(batch, [last], at=torch.full((3,), batch.ids.shape[1] - 1))[last]
    torch.testing.assert_close(model.unembed(hidden), model.logits(batch)[:, 0], atol=1e-5, rtol=1e-5)


def test_write_lands_in_the_output_and_restored_brings_the_bytes_back(model):
    batch = encode(model.tokenizer, PROMPTS[:1])
    for kind in (Kind.ATTN, Kind.MLP):
        site = Site(kind, 1)
        before, bytes_before = model.logits(batch), model.fingerprint()
        generator = torch.Generator().manual_seed(0)
        update = LowRank(
            torch.randn(model.d_model, 2, generator=generator),
            torch.randn(2, model.key_size(site), generator=generator),
        )
        key = model.read(batch, [site], "key")[site]
        with pytest.raises(RuntimeError, match="inside"), model.restored([site]):
            value = model.read(batch, [site])[site]
            model.write(site, update)
            moved = model.read(batch, [site])[site] - value
            torch.testing.assert_close(moved, key @ update.dense().T, atol=1e-4, rtol=1e-4)
            assert not torch.equal(model.logits(batch), before)
            raise RuntimeError("inside")
        assert model.fingerprint() == bytes_before


def test_structure_is_named(family):
    model = tiny_model(family)
    text = repr(model)
    assert "W_o" in text and "down_proj" in text
    assert model.layout.parallel == (family in {"gptj", "gpt_neox", "phi"})
    assert model.layout.has_post_norm == (family in {"gemma2", "gemma3_text", "olmo2"})
    assert model.layout.transposed == (family == "gpt2")


def test_grouped_query_attention_has_a_key_per_query_head():
    model = tiny_model("qwen3")  # 4 heads of 16 on d_model 32, 2 key/value heads
    assert model.key_size(Site(Kind.ATTN, 0)) == 64
    assert model.weight(Site(Kind.ATTN, 0)).shape == (32, 64)


def test_generation_is_batch_independent():
    model = tiny_model("gpt2")
    for options in ({}, {"do_sample": True, "top_k": 5, "seed": 3}):
        together = model.generate(PROMPTS, 8, **options)
        assert together == [model.generate([p], 8, **options)[0] for p in PROMPTS]
    assert model.generate(PROMPTS, 8, do_sample=True, seed=1) != model.generate(PROMPTS, 8, do_sample=True, seed=2)


def test_continuations_keep_the_space_that_sentencepiece_would_drop():
    tokenizer = sentencepiece_tokenizer()
    model = tiny_model("llama", tokenizer=tokenizer, vocab_size=len(tokenizer))
    for prompt, text in zip(PROMPTS, model.generate(PROMPTS, 6), strict=True):
        batch = encode(tokenizer, [prompt])
        ids = model.module.generate(batch.ids, attention_mask=batch.mask, max_new_tokens=6, do_sample=False)
        assert prompt + text == tokenizer.decode(ids[0], skip_special_tokens=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_read_write_and_restore(family, dtype):
    model = kt.load(tiny_module(family).to(dtype), tokenizer=byte_level_tokenizer())
    before = model.fingerprint()
    site = Site(Kind.MLP, 0)
    with model.restored([site]):
        model.write(site, torch.full((model.d_model, model.key_size(site)), 0.1))
        assert model.fingerprint() != before
    assert model.fingerprint() == before


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_loads_by_path(tmp_path, family):
    tiny_module(family).save_pretrained(tmp_path)
    with pytest.raises(UnknownModel, match="tokenizer"):
        kt.load(str(tmp_path))
    byte_level_tokenizer().save_pretrained(tmp_path)
    model = kt.load(str(tmp_path), device="cpu")
    torch.testing.assert_close(
        model.logits(model.encode(PROMPTS)),
        tiny_model(family, tokenizer=model.tokenizer).logits(model.encode(PROMPTS)),
    )


def test_wrong_input_is_one_clear_error(tmp_path):
    for bad, error, words in (
        (lambda: kt.load("no/such-model"), UnknownModel, "no/such-model"),
        (lambda: kt.load(str(tmp_path)), UnknownModel, "cannot load"),
        (lambda: kt.load(tiny_module("gpt2")), UnknownModel, "tokenizer"),
        (lambda: kt.load("demo", dtype="int3"), KtError, "int3"),
        (lambda: kt.load("demo", device="cuda:7"), KtError, "cuda:7"),
        (lambda: tiny_model("gpt2").block(3), UnknownSite, "layers 0 to 2"),
        (lambda: tiny_model("gpt2").weight(Site(Kind.RESID, 0)), UnknownSite, "no weight"),
        (lambda: Site.parse("mlp.x"), UnknownSite, "mlp.5"),
    ):
        with pytest.raises(error, match=words) as caught:
            bad()
        assert "\n" not in str(caught.value)


def test_an_unknown_structure_lists_what_was_looked_for():
    from transformers import AutoModelForCausalLM, RwkvConfig, XLMConfig

    sizes = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2)
    rwkv = AutoModelForCausalLM.from_config(RwkvConfig(**sizes, attention_hidden_size=16))
    xlm = AutoModelForCausalLM.from_config(XLMConfig(emb_dim=16, n_layers=2, n_heads=2, n_words=64))
    for module in (rwkv, xlm):
        with pytest.raises(UnknownModel, match="Looked for"):
            kt.load(module, tokenizer=sentencepiece_tokenizer())
