"""Experts, second mixers and layers of other mixers in traces: patched as they are, nothing where they are not."""

import numpy as np
import pytest
import torch
from families import HYBRIDS, MIXTURES, tiny_model

import kt
from kt.errors import BadFact, KtError, UnknownSite
from kt.model.sites import Site
from kt.tracing.patches import labels

FACT = kt.Fact("The {} is in the city of", "Space Needle", answer="Paris", foil="Rome")
pytestmark = pytest.mark.filterwarnings("ignore")


def traced(model, kinds, **changes):
    return kt.causal_trace(model, [FACT], kinds=kinds, samples=2, keep="all", **changes).facts[0]


@pytest.mark.parametrize("family", MIXTURES)
def test_an_experts_patch_puts_back_what_it_adds(family):
    """Against a plain hook: what the expert adds in the clean run takes the place of what it adds in the corrupted."""
    model = tiny_model(family)
    layer, noise = 1, torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(3))
    fact = traced(model, ("experts", "mlp"), noise=[noise.expand(2, -1, -1)])
    ids = torch.tensor([model.tokenizer(FACT.prompt)["input_ids"]])
    token, span = fact.span.last, slice(fact.span.start, fact.span.last + 1)
    every = [Site(f"mlp.experts.{number}", layer) for number in range(model.layout.at(layer).mixture.count)]
    sent = model.read(model.encode([FACT.prompt]), every, "value")
    expert, site = next((n, site) for n, site in enumerate(every) if sent[site][0, token].any())

    def corrupt(_module, _inputs, output):
        output = output.clone()
        output[0, span] += noise[0]
        return output

    clean = model.read(model.encode([FACT.prompt]), [site], "value")[site][0, token]
    handle = model.embedding.register_forward_hook(corrupt)
    try:
        corrupted = model.read(model.encode([FACT.prompt]), [site], "value")[site][0, token]

        def patch(_module, _inputs, output):
            whole = output[0] if isinstance(output, tuple) else output
            rows = whole.view(-1, whole.shape[-1])
            rows[token] += clean - corrupted
            return output

        block = model.layout.at(layer)
        module = model.module.get_submodule(f"{model.layout.blocks}.{layer}.{block.mlp}")
        inner = module.register_forward_hook(patch)
        with torch.no_grad():
            logits = model.module(input_ids=ids, use_cache=False).logits[0, -1].float()
        inner.remove()
    finally:
        handle.remove()
    assert (clean - corrupted).norm() > 0
    wanted = float(logits.softmax(-1)[fact.answer_ids[0]])
    assert fact.patched[f"mlp.e{expert}"]["prob"][layer, token, 0] == pytest.approx(wanted, rel=2e-5)


def test_all_experts_are_named_by_their_labels():
    model = tiny_model("deepseek_v3")
    assert labels(model, ("experts",)) == ("mlp.e0", "mlp.e1", "mlp.e2", "mlp.e3", "mlp.s0")
    fact = traced(model, ("experts",))
    for kind in fact.patched:  # the first block is dense: there no expert can be patched
        assert np.allclose(fact.patched[kind]["prob"][0], fact.corrupted["prob"], rtol=1e-5)
    assert any(np.ptp(fact.patched[kind]["prob"][1:]) > 0 for kind in fact.patched)


def test_what_a_model_lacks_is_refused_in_one_line():
    dense, mixed = tiny_model("llama"), tiny_model("mixtral")
    with pytest.raises(UnknownSite, match="has no mixture of experts; trace mlp"):
        traced(dense, ("experts",))
    with pytest.raises(UnknownSite, match=r"no layer of .* has mlp.e7; it has mlp.e0, .*mlp.e3"):
        traced(mixed, ("mlp.e7",))
    with pytest.raises(UnknownSite, match=r"no layer of .* has attn.second; trace mlp, attn or hidden"):
        traced(mixed, ("attn.second",))
    with pytest.raises(BadFact, match="experts are patched, not estimated"):
        traced(mixed, ("mlp.e0",), method="atp")
    with pytest.raises(KtError, match="knowledge neurons are those of dense MLPs"):
        kt.knowledge_neurons(mixed, [FACT])


@pytest.mark.parametrize("family", HYBRIDS)
def test_heads_and_parts_are_patched_where_they_are(family):
    model = tiny_model(family)
    fact = traced(model, ("attn", "mlp", "hidden", "heads"))
    token = fact.span.last
    for kind, values in fact.patched.items():
        for layer, mixer in enumerate(model.layout.mixers):
            parts = model.layout.at(layer)
            there = parts.mlp if kind == "mlp" else mixer == "attention" if ".h" in kind else mixer or kind == "hidden"
            moved = np.abs(values["logit_diff"][layer, token] - fact.corrupted["logit_diff"]).max()
            assert there or moved < 1e-5, (kind, layer)
            if there and layer < model.n_layers - 1 and ".h" not in kind:  # after the last one no token sees another
                assert moved > 0, (kind, layer)


def test_two_mixers_of_one_block_are_patched_apart():
    fact = traced(tiny_model("falcon_h1"), ("attn", "attn.second"))
    one, other = (fact.patched[kind]["logit_diff"] for kind in ("attn", "attn.second"))
    assert not np.allclose(one, other) and np.abs(other - fact.corrupted["logit_diff"]).max() > 0


@pytest.mark.parametrize("family", ["mixtral", "lfm2", "nemotron_h"])
def test_estimates_and_probes_read_them_too(family):
    model = tiny_model(family)
    estimate = kt.causal_trace(model, [FACT], samples=1, keep="all", method="atp")
    assert np.isfinite(estimate.facts[0].patched["mlp"]["logit_diff"]).all()
    probe = kt.contrast_probe(model, [FACT])
    assert probe.n_layers == model.n_layers
